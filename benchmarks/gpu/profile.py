"""Where a step's time goes at true shapes: `python -m benchmarks.gpu.profile FOLDER [--rounds 40]`.

FOLDER holds a checkpoint. Three ways alternate, step by step: resident; streamed with every expert in its
slot, looked up on the device; and the same with a synchronisation a layer. Figures: docs/measurements.md.
"""

import argparse
import collections
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from rich.console import Console
from rich.table import Table

from benchmarks.rig.drive import use_engine_environment
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from streaming.files.headers import read_headers
from streaming.store import ExpertStore

CONTEXTS, PROMPTS = (16, 4096, 16384), (32, 128, 512, 2048)
WARM_STEPS = 8


class Side:
    """A model and one way of getting at its experts."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.caches: dict[int, SequenceCache] = {}

    def feed(self, cache: SequenceCache, count: int, seed: int = 0) -> mx.array:
        """The likeliest token after so many more; lazy."""
        vocab = self.model.args.vocab_size
        tokens = mx.array([(17 + 7919 * (i + seed)) % vocab for i in range(count)])
        return self.model.logits(self.model(tokens, [Span(cache, 0, count)])[-1:]).argmax()

    def step(self, context: int, seed: int) -> tuple[float, float]:
        """Seconds of building one step's graph, and of the whole step."""
        started = time.perf_counter()
        token = self.feed(self.caches[context], 1, seed)
        built = time.perf_counter()
        token.item()
        return built - started, time.perf_counter() - started


class Streamed:
    """A store that holds every expert and does not say so."""

    is_resident = False

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def open_sides(folder: Path) -> dict[str, Side]:
    """All ways share one store, and so one copy of the experts."""
    checkpoint, arithmetic = open_checkpoint(folder), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, checkpoint.args.n_routed_experts, float_dtype=arithmetic.dtype)
    store.load_all()
    return {
        name: Side(load_model(checkpoint, ways, cast(ExpertStore, source)))
        for name, source, ways in (
            ("resident", store, arithmetic),
            ("streamed, slots on the device", Streamed(store), arithmetic),
            ("streamed, a round trip a layer", Streamed(store), replace(arithmetic, slots_on_device=False)),
        )
    }


def count_operations(output: mx.array) -> collections.Counter[str]:
    """Operations of the graph behind it, by name."""
    with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
        mx.export_to_dot(file.name, output)
        return collections.Counter(re.findall(r'label ?= ?"([A-Za-z0-9_]+)"', file.read()))


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    array = mx.random.normal((256, 1024, 1024))
    mx.eval(array)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        mx.eval(array + 1)
        times.append(time.perf_counter() - started)
    return 2 * array.nbytes / min(times)


def weight_bytes(side: Side, store_bytes: int) -> int:
    """Bytes of weights that one token needs: the trunk without its embedding, and the chosen experts."""
    args, model = side.model.args, side.model
    arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
    trunk = sum(array.nbytes for name, array in arrays.items() if "embed_tokens" not in name)
    return trunk + store_bytes * args.num_experts_per_tok // args.n_routed_experts


def measure_decode(sides: dict[str, Side], context: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    for side in sides.values():
        side.caches[context] = side.model.make_cache()
        side.feed(side.caches[context], context).item()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + WARM_STEPS):
        for name, side in sides.items():
            seen[name].append(side.step(context, number))
    return {name: steps[WARM_STEPS:] for name, steps in seen.items()}


def measure_prompts(sides: dict[str, Side], rows: int, rounds: int) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side.feed(side.model.make_cache(), rows, 31 * number).item()
            seen[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seen.items()}


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f} ({min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f})"


def print_step(side: Side) -> None:
    """Operations of a step, and its head alone."""
    args, cache = side.model.args, side.caches[CONTEXTS[0]]
    side.model.arithmetic = replace(side.model.arithmetic, launches_early=False)  # or little of it is left
    counts = count_operations(side.feed(cache, 1))
    print(f"operations a step: {counts.total()}, a layer: {counts.total() / args.num_hidden_layers:.0f}")
    print(", ".join(f"{name} {count}" for name, count in counts.most_common(24)))
    hidden, times = mx.random.normal((1, args.hidden_size)).astype(side.model.arithmetic.dtype), []
    for _ in range(20):
        started = time.perf_counter()
        side.model.logits(hidden).argmax().item()
        times.append(time.perf_counter() - started)
    print(f"head alone: {spread(times)} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each way, in turn")
    options = parser.parse_args()
    use_engine_environment("benchmarks.gpu.profile")
    sides = open_sides(options.folder)
    first = next(iter(sides.values()))
    experts = sum(
        entry.nbytes for entry in read_headers(options.folder).values() if ".switch_mlp." in entry.name
    )
    floor_s = weight_bytes(first, experts) / copy_rate()
    table = Table(title=f"milliseconds, median of {options.rounds} (lowest to highest), steps alternating")
    for column in ("", *sides):
        table.add_column(column)
    for context in CONTEXTS:
        steps = measure_decode(sides, context, options.rounds)
        for place, what in enumerate(("building the graph", "whole step")):
            cells = [spread([step[place] for step in steps[name]]) for name in sides]
            table.add_row(f"{what} at {context}", *cells)
        medians = [statistics.median(step[1] for step in steps[name]) for name in sides]
        table.add_row("of resident, in speed", *(f"{medians[0] / median:.2f}" for median in medians))
        layers = first.model.args.num_hidden_layers - first.model.args.first_k_dense_replace
        table.add_row("more a MoE layer", *(f"{(m - medians[0]) / layers * 1e3:.3f}" for m in medians))
        table.add_row("times its bytes", *(f"{median / floor_s:.1f}" for median in medians))
    for rows in PROMPTS:
        prompts = measure_prompts(sides, rows, 3)
        table.add_row(f"prompt of {rows}", *(spread(prompts[name]) for name in sides))
    Console(width=150).print(table)
    print(f"a token's weights: {floor_s * 1e3:.2f} ms at the rate of a copy")
    print(f"peak memory: {mx.get_peak_memory() / 1e9:.1f} GB")
    print_step(first)


if __name__ == "__main__":
    main()
