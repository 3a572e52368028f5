"""How models in the box are made. Not part of the product: nothing in it is imported by the four folders."""
