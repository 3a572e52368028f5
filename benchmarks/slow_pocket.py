"""Pocket with a quarter of its experts in memory and the rest on a simulated disk as slow as the target's.

The target's published decode spends 0.22 s of a token on bytes and 0.16 s on everything else
(docs/measurements.md). A disk of `rate_like_the_target` gives Pocket the same balance on this machine, if
half of a token's experts have to be read. Used by benchmarks of saved prompts.
"""

import time
from dataclasses import dataclass, field
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.simulated_disk import SimulatedDisk
from models.attention import Span
from server.checkpoint import POCKET
from server.engine.limits import Limits
from server.engine.messages import ModelInfo
from server.engine.model import Backend
from streaming.banks import slot_bytes
from streaming.disk import DirectDisk
from tests.checkpoints import Opened, open_model

LATENCY_S = 1e-4
SLOTS = 16
IO_PER_COMPUTE = 0.22 / 0.16
CONTEXT = 40_000


@dataclass
class SlowPocket:
    """A model whose experts come from a simulated disk; of them nothing is in memory at first."""

    rate: float
    disk: SimulatedDisk = field(init=False)
    opened: Opened = field(init=False)

    def __post_init__(self) -> None:
        self.disk = SimulatedDisk(self.rate, LATENCY_S, DirectDisk())
        self.opened = open_model(POCKET, SLOTS, disk=self.disk)

    @property
    def sweep_bytes(self) -> int:
        """All experts of all layers."""
        index = self.opened.checkpoint.experts
        return index.num_experts * sum(slot_bytes(index.parts(layer), mx.float32) for layer in index.layers)

    def backend(self, pass_rows: int) -> Backend:
        """For the engine's loop."""
        limits = Limits(pass_rows=pass_rows, kv_tokens=8 * CONTEXT, is_streaming=True)
        info = ModelInfo(self.opened.checkpoint.args.vocab_size, CONTEXT)
        return Backend(self.opened.model, info, limits=limits)


def rate_like_the_target(num_tokens: int = 32) -> float:
    """Bytes per second, from the time of a decoded token with all experts in memory."""
    opened = open_model(POCKET)
    model, cache = opened.model, opened.model.make_cache()
    mx.eval(model(mx.array(random_tokens(0, 64)), [Span(cache, 0, 64)]))
    seconds = []
    for _ in range(num_tokens):
        started = time.perf_counter()
        mx.eval(model.logits(model(mx.array([300]), [Span(cache, 0, 1)])))
        seconds.append(time.perf_counter() - started)
    index, args = opened.checkpoint.experts, opened.checkpoint.args
    token_bytes = args.num_experts_per_tok * sum(index.expert_bytes(layer) for layer in index.layers)
    opened.store.close()
    rate = 0.5 * token_bytes / (IO_PER_COMPUTE * median(seconds))
    print(
        f"a token takes {1000 * median(seconds):.1f} ms to compute: a disk of {rate / 1e6:.1f} MB/s",
        flush=True,
    )
    return rate


def random_tokens(seed: int, length: int) -> tuple[int, ...]:
    """Ordinary tokens of Pocket's vocabulary."""
    return tuple(int(t) for t in np.random.default_rng(seed).integers(300, 4000, length))
