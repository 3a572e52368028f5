"""Measurements of several agents at once."""
