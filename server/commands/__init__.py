"""The commands of `glmserve`, a file for each."""
