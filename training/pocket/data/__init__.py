"""The generator of Pocket's training data and of the held-out cases."""
