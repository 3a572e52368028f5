"""Routed experts: the router with its correction bias, and experts as grouped matrix products.

Owns the permutation of tokens to experts. The correction bias decides the choice alone and is moved by the
trainer towards an even load, never by a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.pocket.network.parts import MLP
from training.pocket.network.quant import fake_quantised
from training.pocket.network.settings import EXPERT_BITS, Settings


class Spread(torch.autograd.Function):
    """Copies each token to its slots in expert order; backwards the copies are summed without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Puts rows into another order; backwards into the order they had."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0][back], None, None


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the transposed weight of their group; `ends` are the groups' ends."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        product: Tensor = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return product
    pieces = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([piece @ weight[index].T for index, piece in enumerate(pieces)])


class Router(nn.Module):
    """Sigmoid scores in float32; the bias takes part in the choice only."""

    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) * c.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.e_score_correction_bias: Tensor
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights, [N, top_k] each."""
        scores = F.linear(x.float(), self.weight).sigmoid()
        chosen = (
            (scores + self.e_score_correction_bias).topk(self.c.num_experts_per_tok, sorted=False).indices
        )
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.c.routed_scaling_factor
        return chosen, weights


class Experts(nn.Module):
    """All experts of a layer, in the fused form of transformers."""

    def __init__(self, c: Settings) -> None:
        super().__init__()
        inner, hidden, count = c.moe_intermediate_size, c.hidden_size, c.n_routed_experts
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, hidden) * 0.5 * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * 0.25 * inner**-0.5)
        self.bits, self.group, self.quantised = EXPERT_BITS, 64, False
        self.live_gate_up: Tensor | None = None
        self.live_down: Tensor | None = None

    def effective(self, weight: Tensor, live: Tensor | None) -> Tensor:
        """The weights as they are computed with; once there is a live copy, that copy."""
        if live is not None:
            return live
        return fake_quantised(weight, self.bits, self.group) if self.quantised else weight

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        gate, up = grouped(x, self.effective(self.gate_up_proj, self.live_gate_up).to(x.dtype), ends).chunk(
            2, -1
        )
        return grouped(F.silu(gate) * up, self.effective(self.down_proj, self.live_down).to(x.dtype), ends)


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.c = c
        self.experts = Experts(c)
        self.gate = Router(c)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        load = torch.zeros(self.c.n_routed_experts, device=x.device, dtype=torch.int32)
        load.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.int32))
        if self.gate.load is None:
            self.gate.load = torch.zeros_like(load)
        if self.training:
            self.gate.load += load
        spread = Spread.apply(flat, order, inverse, self.c.num_experts_per_tok)
        out = Permute.apply(self.experts(spread, load.cumsum(0).to(torch.int32)), inverse, order)
        mixed = (
            weights.to(x.dtype).unsqueeze(1) @ out.unflatten(0, (-1, self.c.num_experts_per_tok))
        ).squeeze(1)
        return mixed.view(x.shape) + self.shared_experts(x)
