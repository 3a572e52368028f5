"""The small parts of the torch model: norms, linear layers that train quantised, the MLP, the rotation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.pocket.network.quant import fake_quantised


class PlainNorm(nn.Module):
    """RMS norm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class QuantLinear(nn.Module):
    """A linear layer without bias, which trains through its quantised form when `quantised` is set."""

    def __init__(self, inputs: int, outputs: int, bits: int = 6, group: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.5 * inputs**-0.5)
        self.bits, self.group, self.quantised = bits, group, False
        self.live: Tensor | None = None

    def effective(self) -> Tensor:
        """The weight as it is computed with; once there is a live copy, that copy."""
        if self.live is not None:
            return self.live
        return fake_quantised(self.weight, self.bits, self.group) if self.quantised else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective().to(x.dtype))


class Lookup(torch.autograd.Function):
    """Rows of a table; backwards they are added up without sorting, which a CUDA graph can hold."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, device=ids.device)
        return total.index_add_(0, ids.flatten(), grads[0].flatten(0, -2).float()).to(grads[0].dtype), None


class MLP(nn.Module):
    """silu(gate) * up, then down."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = QuantLinear(hidden, inner)
        self.up_proj = QuantLinear(hidden, inner)
        self.down_proj = QuantLinear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, width / 2] in float32."""
    inverse = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * inverse
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotation: the pairs are neighbours."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
