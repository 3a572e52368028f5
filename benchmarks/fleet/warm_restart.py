"""Decode after a restart, with and without the saved hot set: `python -m benchmarks.fleet.warm_restart`.

A store of a quarter of the experts on a simulated disk, asked for what a recorded routing of 256 experts
asked for. A server that goes on, one that starts again with the experts that were in memory, and one that
starts empty answer the same 100 tokens. A read takes 2 ms and a layer's products 1, as on the target.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from benchmarks.rig.routing import Routing, load_routing
from benchmarks.rig.simulated_disk import SimulatedDisk
from config.defaults import ExpertPolicy
from models.loading.loading import open_checkpoint
from streaming.eviction.contest import make_rule
from streaming.eviction.hot_set import HotSet
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore

TRACES = Path(__file__).parents[1] / "traces"
EXPERTS, TOP, SLOTS, SPARSE = 256, 8, 64, 8
GEOMETRY = BENCH | {
    "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1 + SPARSE,
    "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * SPARSE,
    "n_routed_experts": EXPERTS, "vocab_size": 128,
}  # fmt: skip
READ_S, LAYER_S = 2e-3, 1e-3
MEASURED = 100


@contextmanager
def started(index: ExpertIndex, policy: ExpertPolicy) -> Iterator[ExpertStore]:
    """An empty store over a disk that takes `READ_S` for an expert."""
    disk = SimulatedDisk(index.expert_bytes(index.layers[0]) / READ_S)
    store = ExpertStore(
        index, SLOTS, float_dtype=mx.float32, disk=disk, make_policy=make_rule(policy, EXPERTS, TOP)
    )
    try:
        yield store
    finally:
        store.close()


def answer(
    store: ExpertStore, routing: Routing, first: int, count: int, pause_s: float
) -> tuple[float, float]:
    """Tokens a second, and the share of experts that were in memory, of `count` tokens from `first` on."""
    before, began = store.statistics(), time.perf_counter()
    for token in range(first, first + count):
        for number, layer in enumerate(store.layers):
            if store.watches_scores(layer):
                store.observe(layer, routing.scores[token, number, None])
            store.acquire(layer, routing.experts[token, number].tolist())
            time.sleep(pause_s)
    after = store.statistics()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return count / (time.perf_counter() - began), hits / (hits + misses)


def compare(index: ExpertIndex, routing: Routing, policy: ExpertPolicy, at: int) -> list[tuple[float, float]]:
    """The server that goes on, the one that starts again warm, and the one that starts again cold."""
    measured = partial(answer, routing=routing, first=at, count=MEASURED, pause_s=LAYER_S)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hot"
        with started(index, policy) as store:
            answer(store, routing, 0, at, 0.0)
            HotSet(store, path, "model").save()
            goes_on = measured(store)
        with started(index, policy) as store:
            hot_set = HotSet(store, path, "model")
            while hot_set.advance():
                pass
            warm = measured(store)
    with started(index, policy) as store:
        return [goes_on, warm, measured(store)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", default="many-chat", help="a file of benchmarks/traces")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[200, 400, 600], help="tokens before the restart"
    )
    options = parser.parse_args()
    routing = load_routing(TRACES / f"{options.trace}.npz", TOP)
    table = Table(title=f"tokens/s of the {MEASURED} tokens after a restart, and hits; median of the moments")
    for column in ("policy", "goes on", "starts warm", "starts cold", "warm / goes on"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        index = open_checkpoint(write_checkpoint(Path(folder), GEOMETRY)).experts
        policies: tuple[ExpertPolicy, ...] = ("lru", "nearness")
        for policy in policies:
            seen = [compare(index, routing, policy, at) for at in options.at]
            cells = [
                f"{median(one[side][0] for one in seen):.1f} ({median(one[side][1] for one in seen):.1%})"
                for side in range(3)
            ]
            ratios = sorted(one[1][0] / one[0][0] for one in seen)
            table.add_row(policy, *cells, f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
