"""What prompts of a fleet cost each other: `python -m benchmarks.fleet.prompts prompts|mixed`.

The engine's own loop over a streamed tiny model on the simulated disk; token times are those of its events.
Decode is in `benchmarks.fleet.decode`.

prompts  four prompts of 4,096 tokens at once against one after the other, bound by the disk.
mixed    one prompt of 16,384 tokens while four agents decode, and a prompt of 200 behind it.

Run it alone on the machine; each part takes one to three minutes on two cores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rig.drive import Served, drive, use_engine_environment
from benchmarks.rig.simulated_disk import SimulatedDisk
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from server.engine.model_protocol import Backend, EngineModel
from server.engine.schedule.limits import Limits
from server.link.messages import Cancel, Finished, Generate, ModelInfo, Sampling, Token
from streaming.disk.disk import DirectDisk
from tests.checkpoints import Opened, open_model, save_packed
from tests.tiny_glm import WIDER, make_weights

LATENCY_S = 1e-4
NEVER = 10**9
# As on the target a step of four rows wants few of the experts that a sweep reads.
CONFIG, SLOTS = WIDER | {"n_routed_experts": 64, "num_experts_per_tok": 2}, 16


def serve(
    model: EngineModel,
    limits: Limits,
    requests: list[Generate],
    later: Callable[[str, int], Sequence[Generate | Cancel]] = lambda name, count: [],
) -> Served:
    """Serve requests, and what `later` adds or cancels after a token: its request, and its number there."""
    info = ModelInfo(WIDER["vocab_size"], 32_768)

    def react(served: Served, event: Token | Finished) -> Sequence[Generate | Cancel]:
        is_token = isinstance(event, Token)
        return later(event.request_id, len(served.times[event.request_id])) if is_token else []

    return drive(Backend(model, info, limits=limits), requests, react)


def prompt(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(4, vocab, length))


def ask(name: str, ids: tuple[int, ...], max_tokens: int) -> Generate:
    return Generate(name, ids, max_tokens, Sampling(temperature=0), agent=name)


def open_tiny(folder: Path, sweep_s: float) -> tuple[Opened, SimulatedDisk]:
    """A tiny model with a quarter of its experts in memory; reading all others takes `sweep_s`."""
    save_packed(folder, CONFIG, make_weights(CONFIG, 3), lambda path: None)
    index = open_model(folder, SLOTS).checkpoint.experts
    absent = (index.num_experts - SLOTS) * sum(index.expert_bytes(layer) for layer in index.layers)
    disk = SimulatedDisk(absent / sweep_s, LATENCY_S, DirectDisk())
    return open_model(folder, SLOTS, disk=disk), disk


def bench_prompts(console: Console, sweep_s: float, length: int) -> None:
    names = [f"p{i}" for i in range(4)]
    requests = [ask(name, prompt(i, length, 64), 1) for i, name in enumerate(names)]
    limits = Limits(pass_rows=4 * length, kv_tokens=NEVER)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("one after the other", "at once"):
            opened, disk = open_tiny(Path(folder), sweep_s)
            with closing(opened.store):
                _fill(opened.model, disk, limits)
                started, before = time.monotonic(), disk.num_bytes
                for group in [requests] if kind == "at once" else [[request] for request in requests]:
                    serve(opened.model, limits, group)
                seconds[kind] = time.monotonic() - started
            num_bytes = disk.num_bytes - before
            console.print(f"{kind}: {seconds[kind]:.1f} s, {num_bytes / 1e6:.1f} MB read")
    ratio = seconds["at once"] / seconds["one after the other"]
    console.print(
        f"four prompts of {length} tokens at once / one after the other: {ratio:.2f} (wanted: at most 0.4)"
    )


def _fill(model: EngineModel, disk: SimulatedDisk, limits: Limits) -> None:
    """Fill the slots in no time: a server has them full, of whatever came before."""
    rate, disk.bytes_per_s = disk.bytes_per_s, 1e12
    serve(model, limits, [ask("before", prompt(99, 512, 64), 1)])
    disk.bytes_per_s = rate


@dataclass
class Timed:
    """A model that notes how long its layers of many rows take."""

    inner: EngineModel
    longest_layer_s: float = 0.0

    @property
    def num_layers(self) -> int:
        """As the model's own."""
        return self.inner.num_layers

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        """As the model's own."""
        layers, layer_s = self.inner.forward(tokens, spans), 0.0
        while True:
            started_s = time.monotonic()
            try:
                layer = next(layers)
            except StopIteration as end:
                hidden: mx.array = end.value
                return hidden
            layer_s += time.monotonic() - started_s
            if layer is not None:
                self.longest_layer_s, layer_s = max(self.longest_layer_s, layer_s), 0.0
            yield layer

    def logits(self, hidden: mx.array) -> mx.array:
        """[M, H] -> [M, V]."""
        return self.inner.logits(hidden)

    def make_cache(self) -> SequenceCache:
        """An empty cache."""
        return self.inner.make_cache()


def bench_mixed(console: Console, sweep_s: float, length: int) -> None:
    agents = [ask(f"a{i}", prompt(i, 32, 64), 4000) for i in range(4)]
    long, short = ask("long", prompt(8, length, 64), 1), ask("short", prompt(9, 200, 64), 1)
    limits = Limits(pass_rows=length, kv_tokens=NEVER, batch_width=4)

    def disturb(model: EngineModel, *newcomers: Generate) -> Served:
        def later(name: str, count: int) -> Sequence[Generate | Cancel]:
            if name == "long":
                return [Cancel(agent.request_id) for agent in agents]
            return newcomers if (name, count) == ("a0", 20) else []

        return serve(model, limits, agents, later)

    with tempfile.TemporaryDirectory() as folder:
        opened, disk = open_tiny(Path(folder), sweep_s)
        timed = Timed(opened.model)
        with closing(opened.store):
            _fill(opened.model, disk, limits)
            short_s = serve(timed, limits, [short]).first_s("short")
            alone = serve(timed, limits, [long])
            alone_s, part_s, layer_s = alone.first_s("long"), alone.longest_beat_s, timed.longest_layer_s
        opened, disk = open_tiny(Path(folder), sweep_s)
        with closing(opened.store):
            _fill(opened.model, disk, limits)
            served = disturb(opened.model, long)
            behind = disturb(opened.model, long, short)
    start, end = served.asked_at["long"], served.times["long"][0]
    times = served.times["a0"]
    step_s = median(b - a for a, b in pairwise(times) if b < start)
    during = [b - a for a, b in pairwise(times) if b > start and a < end]
    rate = sum(start < time_s < end for time_s in times) / (end - start) * step_s
    table = Table(title=f"four agents decode, {length} tokens arrive; once more with 200 behind them")
    for column in ("", "seen", "wanted"):
        table.add_column(column, justify="right")
    gap_s, behind_s = 3 * step_s + part_s, 1.6 * (2 * short_s + layer_s) + 3 * step_s
    for row in (
        ("undisturbed step, ms", f"{1e3 * step_s:.1f}", ""),
        ("longest part of a layer / layer, s", f"{part_s:.2f} / {layer_s:.2f}", ""),
        ("longest gap, s", f"{max(during):.2f}", f"<= {gap_s:.2f}: 3 steps and a part"),
        ("rate, of undisturbed", f"{rate:.3f}", ">= 0.300"),
        (f"first token of {length}, s", f"{served.first_s('long'):.1f}",
         f"<= {1.6 * alone_s:.1f}: 1.6 x alone"),
        ("first token of 200, s", f"{behind.first_s('short'):.2f}",
         f"<= {behind_s:.2f}: 1.6 x (2 x alone + a layer) + 3 steps"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("prompts", "mixed"))
    parser.add_argument("--sweep-s", type=float, default=6.0, help="seconds of disk for all absent experts")
    parser.add_argument("--length", type=int, help="tokens of a prompt (default 4096, mixed 16384)")
    given = parser.parse_args()
    use_engine_environment("benchmarks.fleet.prompts")
    console = Console(width=110)
    match given.part:
        case "prompts":
            bench_prompts(console, given.sweep_s, given.length or 4096)
        case "mixed":
            bench_mixed(console, given.sweep_s, given.length or 16_384)


if __name__ == "__main__":
    main()
