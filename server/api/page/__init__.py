"""The two pages for browsers, each one self-contained file: what happens now, and the routes."""
