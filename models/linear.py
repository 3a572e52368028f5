"""The one linear layer: dense or packed, one matrix or one for each head. Called by the blocks.

mlx.nn and mlx-lm have four classes for this, each bound to one kernel; here the kernel is the choice of
`Arithmetic`.
"""

import mlx.core as mx
import mlx.nn as nn

from models.arithmetic import Arithmetic, Quantization


class Linear(nn.Module):
    """y = x W^T without bias. The weight is a placeholder until the checkpoint's tensors are loaded."""

    def __init__(
        self, input_dims: int, output_dims: int, arithmetic: Arithmetic, *, num_heads: int | None = None
    ) -> None:
        super().__init__()
        self._arithmetic = arithmetic
        self.quantization: Quantization | None = None
        heads = () if num_heads is None else (num_heads,)
        self.weight = mx.zeros((*heads, output_dims, input_dims), dtype=arithmetic.dtype)

    def pack(self, quantization: Quantization) -> None:
        """Expect a packed weight: placeholders of the packed shapes take the place of the dense one."""
        *lead, input_dims = self.weight.shape
        groups = input_dims // quantization.group_size
        affine = quantization.mode == "affine"
        dtype = self._arithmetic.dtype if affine else mx.uint8
        self.weight = mx.zeros((*lead, input_dims * quantization.bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((*lead, groups), dtype=dtype)
        if affine:
            self.biases = mx.zeros((*lead, groups), dtype=dtype)
        self.quantization = quantization

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., rows, in] -> [..., rows, out]; with heads the leading axis of x is the head."""
        return self._arithmetic.product(x, self)
