"""Other programs on the same machine and the same weights, in the same run."""
