"""The small parts of the torch model: norms, linear layers that can be seen quantised, the dense MLP, the rotation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pocket.recipe.quant import fake_quantised


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

    def effective(self) -> Tensor:
        return fake_quantised(self.weight, self.bits, self.group) if self.quantised else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective().to(x.dtype))


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
