"""Pocket with a quarter of its experts in memory and the rest on a simulated disk as slow as the target's.

The target's published decode spends 0.22 s of a token on bytes and 0.16 s on everything else. A disk of
`rate_like_the_target` gives Pocket's decode the same balance on this machine, with what it reads by its own
routing; or both are simulated, then a lone token computes for `token_s`. Used by benchmarks of saved prompts.
"""

import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

import server
from benchmarks.rig.simulated_device import PacedStore
from benchmarks.rig.simulated_disk import SimulatedDisk
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.loading.loading import open_checkpoint
from server.commands.checkpoint import POCKET
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.glm.tokenizer import load_tokenizer
from server.link.messages import ModelInfo
from streaming.disk.disk import DirectDisk
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed
from streaming.store import ExpertStore
from tests.checkpoints import Opened, open_model

LATENCY_S = 1e-4
SHARE = 4  # of the experts a quarter is in memory
IO_PER_COMPUTE = 0.22 / 0.16
CONTEXT = 40_000
NUM_TEXTS, NUM_TOKENS = 8, 48


@dataclass
class SlowPocket:
    """A model whose experts come from a simulated disk; of them nothing is in memory at first."""

    rate: float
    token_s: float | None = None  # None: as this machine computes
    folder: Path = POCKET
    is_plain: bool = False  # the least recently used expert goes and nothing is guessed
    disk: SimulatedDisk = field(init=False)
    opened: Opened = field(init=False)

    def __post_init__(self) -> None:
        self.disk = SimulatedDisk(self.rate, LATENCY_S, DirectDisk())
        args = open_checkpoint(self.folder).args
        top_k = args.num_experts_per_tok
        paced = partial(PacedStore, token_s=self.token_s, top_k=top_k) if self.token_s else ExpertStore
        nearness = partial(LeastNearlyChosen, args.n_routed_experts, top_k)
        make_policy = LeastRecentlyUsed if self.is_plain else nearness
        self.opened = open_model(
            self.folder,
            args.n_routed_experts // SHARE,
            choose_arithmetic(),
            looks_ahead=not self.is_plain,
            disk=self.disk,
            make_store=partial(paced, make_policy=make_policy),
        )

    @property
    def sweep_bytes(self) -> int:
        """All experts of all layers."""
        index = self.opened.checkpoint.experts
        return index.num_experts * sum(index.expert_bytes(layer) for layer in index.layers)

    def backend(self, pass_rows: int) -> Backend:
        """For the engine's loop."""
        limits = Limits(pass_rows=pass_rows, kv_tokens=8 * CONTEXT)
        info = ModelInfo(self.opened.checkpoint.args.vocab_size, CONTEXT)
        return Backend(self.opened.model, info, limits=limits)


def rate_like_the_target(token_s: float | None = None, folder: Path = POCKET) -> float:
    """Bytes per second at which decoding alone has the target's balance, from two measurements.

    The time of a token with all experts in memory, if not `token_s`, and the bytes that one reads with a
    quarter of them, without guessing.
    """
    arithmetic = choose_arithmetic()
    slots = open_checkpoint(folder).args.n_routed_experts // SHARE
    seconds = token_s or _decode(open_model(folder, None, arithmetic))[0]
    _, num_bytes = _decode(open_model(folder, slots, arithmetic, looks_ahead=False))
    rate = num_bytes / (IO_PER_COMPUTE * seconds)
    print(
        f"a token takes {1000 * seconds:.1f} ms to compute and reads {num_bytes / 1e6:.2f} MB: "
        f"a disk of {rate / 1e6:.1f} MB/s",
        flush=True,
    )
    return rate


def _decode(opened: Opened) -> tuple[float, float]:
    """Median seconds of a sampled token, and mean bytes that it reads: the second half behind each of some
    texts, since what is written behind one may be a row of blanks."""
    model, store = opened.model, opened.store
    seconds: list[float] = []
    num_bytes = 0
    for text in range(NUM_TEXTS):
        kv = model.make_cache()
        hidden = model(mx.array(text_tokens(text, 256)), [Span(kv, 0, 256)])
        keys = mx.random.split(mx.random.key(text), NUM_TOKENS)
        for number in range(NUM_TOKENS):
            before = store.statistics().payload_bytes
            started = time.perf_counter()
            token = int(mx.random.categorical(model.logits(hidden[-1:]), key=keys[number])[0])
            hidden = model(mx.array([token]), [Span(kv, 0, 1)])
            mx.eval(hidden)
            if number >= NUM_TOKENS // 2:
                seconds.append(time.perf_counter() - started)
                num_bytes += store.statistics().payload_bytes - before
    store.close()
    return median(seconds), num_bytes / len(seconds)


@cache
def _text() -> list[int]:
    """The sources of `server/` in Pocket's tokens: text as agents read it, routed as text is."""
    paths = sorted(Path(server.__file__).parent.rglob("*.py"))
    return load_tokenizer(POCKET).encode("\n".join(path.read_text(encoding="utf-8") for path in paths))


def text_tokens(seed: int, length: int) -> tuple[int, ...]:
    """So many tokens of text from a place that the seed chooses, after a number of its own."""
    text = _text()
    start = int(np.random.default_rng(seed).integers(0, len(text) - length))
    return (300 + seed, *text[start : start + length - 1])
