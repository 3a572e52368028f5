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

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named:
            shape = matrices(name, parameter).shape
            self.groups[(shape[1], shape[2])].append((name, parameter))
        self.buffers = {
            shape: torch.zeros_like(torch.cat([matrices(n, p.detach()) for n, p in members]))
            for shape, members in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:
        for shape, members in self.groups.items():
            grads = torch.cat([matrices(n, p.grad) for n, p in members if p.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalised(grads.lerp_(buffer, self.momentum))
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            start = 0
            for name, parameter in members:
                count = matrices(name, parameter).shape[0]
                parameter.mul_(1 - lr * self.decay)
                parameter.sub_(update[start : start + count].reshape(parameter.shape) * scale)
                start += count


class Optimizer:
    """Both optimisers behind one step. Learning rates are tensors, so that a CUDA graph can hold the step."""

    def __init__(self, model: nn.Module, muon_lr: float = 0.02, adam_lr: float = 3e-3) -> None:
        named = list(model.named_parameters())
        device = named[0][1].device
        for _, parameter in named:
            parameter.grad = torch.zeros_like(parameter)
        self.muon = Muon([(n, p) for n, p in named if is_muon_parameter(n, p)])
        rest = [(n, p) for n, p in named if not is_muon_parameter(n, p)]
        router = [p for n, p in rest if "mlp.gate." in n]
        others = [p for n, p in rest if "mlp.gate." not in n]
        self.base = (muon_lr, adam_lr / 3, adam_lr)
        self.rates = [torch.tensor(rate, device=device) for rate in self.base]
        groups = [{"params": router, "lr": self.rates[1]}, {"params": others, "lr": self.rates[2]}]
        on_gpu = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            groups, lr=self.rates[2], betas=(0.9, 0.98), weight_decay=0.0, capturable=on_gpu, foreach=on_gpu
        )

    def set_factor(self, factor: float) -> None:
        for rate, base in zip(self.rates, self.base, strict=True):
            rate.fill_(base * factor)

    def step(self) -> None:
        self.adam.step()
        self.muon.step(self.rates[0])

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers}

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for group, rate in zip(self.adam.param_groups, self.rates[1:], strict=True):
            group["lr"] = rate
        for shape, buffer in self.muon.buffers.items():
            buffer.copy_(state["muon"][shape])
