"""Muon for the matrices of the layers (experts included), AdamW for all else.

Owns both states. Muon's step is the momentum made orthogonal by five Newton-Schulz iterations.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Matrices inside the layers, without the router and the indexer."""
    outside = ("embed_tokens", "lm_head", "mlp.gate.", "indexer.")
    return parameter.dim() >= 2 and not any(part in name for part in outside)


def orthogonalised(x: Tensor) -> Tensor:
    """Each matrix of the stack [N, r, c] with its singular values moved near one."""
    a, b, c = COEFFICIENTS
    y = x.bfloat16() if x.is_cuda else x
    tall = y.shape[-2] > y.shape[-1]
    y = y.transpose(-1, -2) if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.transpose(-1, -2)
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.transpose(-1, -2) if tall else y


def matrices(name: str, x: Tensor) -> Tensor:
    """A parameter as a stack of the matrices it is made of."""
    if name.endswith("gate_up_proj"):
        return x.reshape(-1, x.shape[1] // 2, x.shape[2])
    return x if x.dim() == 3 else x.unsqueeze(0)


class Muon:
    """Momentum, orthogonalised, on stacks of equal shape."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], momentum: float = 0.95, decay: float = 0.1) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named:
            shape = matrices(name, parameter).shape
            self.groups[(shape[1], shape[2])].append((name, parameter))
        self.buffers: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, members in self.groups.items():
            grads = torch.cat([matrices(n, p.grad) for n, p in members if p.grad is not None])
            buffer = self.buffers.setdefault(shape, torch.zeros_like(grads))
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalised(grads.lerp_(buffer, self.momentum)).to(grads.dtype)
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            start = 0
            for name, parameter in members:
                count = matrices(name, parameter).shape[0]
                parameter.mul_(1 - lr * self.decay)
                parameter.add_(update[start : start + count].reshape(parameter.shape), alpha=-scale)
                start += count


class Optimizer:
    """Both optimisers behind one step; `factor` scales all learning rates."""

    def __init__(self, model: nn.Module, muon_lr: float = 0.02, adam_lr: float = 3e-3) -> None:
        named = list(model.named_parameters())
        self.muon_lr = muon_lr
        self.muon = Muon([(n, p) for n, p in named if is_muon_parameter(n, p)])
        rest = [(n, p) for n, p in named if not is_muon_parameter(n, p)]
        router = [p for n, p in rest if "mlp.gate." in n]
        others = [p for n, p in rest if "mlp.gate." not in n]
        groups = [{"params": router, "lr": adam_lr / 3}, {"params": others, "lr": adam_lr}]
        fused = next(model.parameters()).is_cuda
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self.base = [group["lr"] for group in self.adam.param_groups]

    def step(self, factor: float) -> None:
        for group, base in zip(self.adam.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        self.adam.step()
        self.muon.step(self.muon_lr * factor)
        self.adam.zero_grad(set_to_none=True)
        for members in self.muon.groups.values():
            for _, parameter in members:
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers}

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]
