"""Live weights and CUDA graphs: what makes a training step cheap to start.

Owns the bf16 copies that the passes compute with (quantised or not, refreshed once a step; gradients pass
straight through to the trained weights), and the captured graphs of the passes and of the optimiser's
step. On the CPU the same functions run without capture.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.pocket.network.model import Attention, Pocket
from training.pocket.network.moe import Experts
from training.pocket.network.parts import QuantLinear
from training.pocket.network.quant import rounded


def make_leaf(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True).requires_grad_()


class LiveWeights:
    """The live copies of a model, the gradients' way back, and their refreshing."""

    def __init__(self, model: Pocket) -> None:
        self.model = model
        leaf_of: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.live = make_leaf(module.weight, model.dtype)
                leaf_of[id(module.weight)] = module.live
            elif isinstance(module, Experts):
                module.live_gate_up = make_leaf(module.gate_up_proj, model.dtype)
                module.live_down = make_leaf(module.down_proj, model.dtype)
                leaf_of[id(module.gate_up_proj)] = module.live_gate_up
                leaf_of[id(module.down_proj)] = module.live_down
        self.parameters: list[nn.Parameter] = list(model.parameters())
        self.leaves = [leaf_of.get(id(p), p) for p in self.parameters]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the loss to those of the trained weights."""
        grads = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            if grad is not None and parameter.grad is not None:
                parameter.grad.add_(grad)

    @torch.no_grad()
    def refresh(self, quantised: bool) -> None:
        """Brings the live copies up to date."""
        for module in self.model.modules():
            if isinstance(module, QuantLinear):
                assert module.live is not None
                module.live.copy_(
                    rounded(module.weight, module.bits, module.group) if quantised else module.weight
                )
            elif isinstance(module, Experts):
                assert module.live_gate_up is not None
                assert module.live_down is not None
                for weight, live in (
                    (module.gate_up_proj, module.live_gate_up),
                    (module.down_proj, module.live_down),
                ):
                    live.copy_(rounded(weight, module.bits, module.group) if quantised else weight)
        if quantised:
            for module in self.model.modules():
                if isinstance(module, Attention):
                    refresh_kv_b(module)


@torch.no_grad()
def refresh_kv_b(attention: Attention) -> None:
    """kv_b is quantised in two halves, each in its own direction."""
    linear = attention.kv_b_proj
    assert linear.live is not None
    linear.live.copy_(attention.quantised_kv_b())


class Graphs:
    """Captured functions by key, in one memory pool; replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self.graphs: dict[object, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: object, function: Callable[[], None]) -> None:
        """Runs the function; the first call for a key runs it once more, to warm up before it is captured."""
        if not self.enabled:
            function()
            return
        if key not in self.graphs:
            self.graphs[key] = self.capture(function)
        self.graphs[key].replay()

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph
