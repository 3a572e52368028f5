"""From a checkpoint's folder to a model that computes: names, checks, and the open checkpoint."""
