"""Rotary position embedding: interleaved pairs, a position for each row. Called by attention and indexer."""

import mlx.core as mx
import numpy as np


class Rope:
    """Rotates the first `dims` of the last axis of x; the rest passes through.

    Frequencies are computed in float32 as the reference does (theta^(2i/dims)), not by MLX's exp2 formula:
    at position 10^6 the two differ by hundredths of a radian.
    """

    def __init__(self, dims: int, theta: float) -> None:
        self.dims = dims
        exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        self._periods = mx.array(np.power(np.float32(theta), exponents))

    @property
    def periods(self) -> mx.array:
        """Of the pairs, float32 [dims / 2]."""
        return self._periods

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        """x [N, heads, D], positions int32 [N] -> [N, heads, D]."""
        rotated = mx.fast.rope(
            x[:, :, None, :], self.dims, traditional=True, base=None, scale=1.0,
            offset=positions, freqs=self._periods,
        )  # fmt: skip
        return rotated[:, :, 0, :]
