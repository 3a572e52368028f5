"""From a training checkpoint to the shipped files, and back."""
