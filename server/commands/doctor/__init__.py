"""`glmserve doctor`: checks of this machine and these flags, and with `--parity` of what MLX does here."""
