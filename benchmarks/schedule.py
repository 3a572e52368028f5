"""How far decode is from the bound of compute and disk: `python -m benchmarks.schedule`.

The real store, reader and threads on a simulated disk; the model's compute is replaced by sleeping, so that
compute : I/O is 0.16 : 0.22, as published for the target, and two noisy cores do not matter. Half of a
layer's compute is trunk, half the shared and the routed experts, one ninth each. Routing has the published
locality; the predictor has a given recall and precision. Prints seconds per token over the bound, both sides
in one run, interleaved.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.policies import count_hits
from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from benchmarks.rig.routing import Routing, make_routing
from benchmarks.rig.simulated_disk import SimulatedDisk
from models.loading.loading import open_checkpoint
from streaming.eviction.policy import LeastRecentlyUsed
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore

COMPUTE_TO_IO = 0.16 / 0.22
SHARED_SHARE = 1 / 18  # of a layer's compute; each routed expert takes as much again
TRUNK_SHARE = 1 / 2


@dataclass(frozen=True)
class Run:
    """One replay: measured against computed."""

    wall_s: float
    compute_s: float
    demand_io_s: float  # of the experts that were not there, read ahead or not
    wasted_bytes: int
    recall: float
    precision: float
    idle_share: float

    @property
    def over_sum(self) -> float:
        return self.wall_s / (self.compute_s + self.demand_io_s)

    @property
    def over_max(self) -> float:
        return self.wall_s / max(self.compute_s, self.demand_io_s)


Predict = Callable[[int, int], list[list[int]]]


def make_predictor(routing: Routing, recall: float, precision: float, seed: int = 0) -> Predict:
    """Guesses with this recall; wrong ones are added until the precision is right."""
    rng = np.random.default_rng(seed)
    num_experts = routing.scores.shape[-1]

    def predict(token: int, layer: int) -> list[list[int]]:
        wanted = routing.experts[token % len(routing.experts), layer]
        right = [int(e) for e in wanted if rng.random() < recall]
        num_wrong = rng.poisson(len(wanted) * recall * (1 - precision) / precision)
        wrong = rng.choice(np.setdiff1d(np.arange(num_experts), wanted), num_wrong, replace=False)
        return [[e] for e in [*right, *(int(e) for e in wrong)]]

    return predict


def replay(
    index: ExpertIndex,
    routing: Routing,
    slots: int,
    layer_s: float,
    predictors: Sequence[Predict],
    bytes_per_s: float,
    wraps: bool = False,
) -> Run:
    disk = SimulatedDisk(bytes_per_s, latency_s=1e-4)
    store = ExpertStore(index, slots, float_dtype=mx.float32, disk=disk)
    warm = routing.experts.shape[0] // 3
    start_s = before = None
    for token, rows in enumerate(routing.experts):
        if token == warm:
            before, start_s = store.statistics(), time.monotonic()
        _token(store, index.layers, rows, token, layer_s, predictors, wraps)
    wall_s = time.monotonic() - (start_s or 0.0)
    assert before is not None, "the warm-up is shorter than the run"
    after = store.statistics()
    store.close()
    num_tokens = routing.experts.shape[0] - warm
    expert_bytes = index.expert_bytes(index.layers[0])
    misses, used = after.misses - before.misses, after.ahead_used - before.ahead_used
    started = after.ahead_started - before.ahead_started
    return Run(
        wall_s=wall_s,
        compute_s=num_tokens * len(index.layers) * layer_s,
        demand_io_s=(misses + used) * expert_bytes / bytes_per_s,
        wasted_bytes=(started - used) * expert_bytes,
        recall=used / max(1, used + misses),
        precision=used / max(1, started),
        idle_share=1 - disk.busy_s / after.read_s,
    )


def _token(
    store: ExpertStore,
    layers: tuple[int, ...],
    rows: NDArray[np.int16],
    token: int,
    layer_s: float,
    predictors: Sequence[Predict],
    wraps: bool,
) -> None:
    """One token. A predictor for each distance; with `wraps` they know the next token's first layers too."""
    routed_s = layer_s * (1 - TRUNK_SHARE - SHARED_SHARE) / rows.shape[1]
    for number, layer in enumerate(layers):
        _compute(layer_s * TRUNK_SHARE)
        fetch = store.begin(layer, [int(e) for e in rows[number]])
        for distance, predict in enumerate(predictors, start=1):
            tokens_on, target = divmod(number + distance, len(layers))
            if wraps or not tokens_on:
                store.expect(layers[target], predict(token + tokens_on, target), distance)
        _compute(layer_s * SHARED_SHARE + routed_s * int(fetch.is_here.sum()))
        store.finish(fetch)
        _compute(routed_s * int((~fetch.is_here).sum()))


def _compute(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--io-ms", type=float, default=12.0, help="disk time of a layer without lookahead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.checkpoint or write_checkpoint(Path(scratch) / "bench")
        index = open_checkpoint(directory).experts
        _report(index, given)


def _report(index: ExpertIndex, given: argparse.Namespace) -> None:
    slots = int(given.share * index.num_experts)
    shape = (given.tokens, len(index.layers), index.num_experts, BENCH["num_experts_per_tok"])
    routing = make_routing(*shape)
    misses = _misses_per_layer(index, routing, slots)
    bytes_per_s = misses * index.expert_bytes(index.layers[0]) / (given.io_ms / 1000)
    layer_s = given.io_ms / 1000 * COMPUTE_TO_IO
    print(
        f"{slots} of {index.num_experts} slots, reuse {routing.reuse:.2f}, {misses:.2f} misses a layer, disk "
        f"{bytes_per_s / 1e6:.0f} MB/s; a layer: {1000 * layer_s:.1f} ms compute, {given.io_ms:.1f} ms disk"
    )
    perfect = make_predictor(routing, 1.0, 1.0)
    near, far = make_predictor(routing, 0.75, 0.80), make_predictor(routing, 0.65, 0.65, seed=1)
    cases: dict[str, tuple[list[Predict], bool]] = {
        "no lookahead": ([], False),
        "recall .75, precision .80": ([near], False),
        "the same, first layer too": ([near], True),
        "and .65 / .65 two layers on": ([near, far], True),
        "perfect": ([perfect], False),
        "perfect, first layer too": ([perfect], True),
        "perfect, two layers on": ([perfect, perfect], False),
        "perfect, two on, first too": ([perfect, perfect], True),
    }
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for _ in range(given.rounds):
        for name, (predictors, wraps) in cases.items():
            runs[name].append(replay(index, routing, slots, layer_s, predictors, bytes_per_s, wraps))
    for name, done in runs.items():
        sums, maxima = [run.over_sum for run in done], [run.over_max for run in done]
        print(
            f"{name:28} / (compute + I/O) {median(sums):.3f} [{min(sums):.3f} {max(sums):.3f}]   "
            f"/ max(compute, I/O) {median(maxima):.3f} [{min(maxima):.3f} {max(maxima):.3f}]   "
            f"recall {done[0].recall:.2f} precision {done[0].precision:.2f} "
            f"wasted {done[0].wasted_bytes / 1e6:.0f} MB   "
            f"disk idle while reads are outstanding {median(run.idle_share for run in done):.1%}"
        )


def _misses_per_layer(index: ExpertIndex, routing: Routing, slots: int) -> float:
    """Of LRU, after the warm-up."""
    warm = routing.experts.shape[0] // 3
    hits = count_hits(routing, slots, LeastRecentlyUsed, warm)
    return routing.experts.shape[-1] * (1 - hits)


if __name__ == "__main__":
    main()
