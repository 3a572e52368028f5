"""Pocket: the checkpoint files lie beside this module; recipe/ made them."""
