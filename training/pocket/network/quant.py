"""MLX's affine quantisation in torch: codes, scales and biases, and the straight-through form for training.

Owns the arithmetic. Scales and biases are rounded to bfloat16 before the codes are chosen, so that what
training saw is exactly what `mx.dequantize` gives from the packed file.
"""

import torch
from torch import Tensor

EPSILON = 1e-7


@torch.no_grad()
def affine_codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., groups, group], and bf16-rounded scales and biases [..., groups, 1], all as float32."""
    levels = 2**bits - 1
    groups = weight.float().unflatten(-1, (-1, group))
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    low_side = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp(min=EPSILON)
    scale = torch.where(low_side, scale, -scale)
    edge = torch.where(low_side, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps == 0, scale, edge / torch.where(steps == 0, 1.0, steps)).bfloat16().float()
    bias = torch.where(steps == 0, 0.0, edge).bfloat16().float()
    codes = torch.round((groups - bias) / scale).clamp(0, levels)
    return codes, scale, bias


@torch.no_grad()
def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """The weight as the quantised file gives it back, in float32."""
    codes, scale, bias = affine_codes(weight, bits, group)
    return (codes * scale + bias).flatten(-2)


def fake_quantised(weight: Tensor, bits: int, group: int) -> Tensor:
    """The rounded weight forwards, the identity backwards."""
    return weight + (rounded(weight, bits, group) - weight).detach()
