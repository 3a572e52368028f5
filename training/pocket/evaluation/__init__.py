"""Asks Pocket the held-out cases, in torch or through a server, and judges the answers."""
