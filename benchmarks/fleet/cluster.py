"""One model on one rank and on two, each with the same memory and its own simulated disk: decode and a sweep.

    python -m benchmarks.fleet.cluster [--ranks 2] [--cold 3.0]

Decode replays a routing of the published locality (`benchmarks.rig.replay`) through the products of the CPU;
`--cold` is the time that the disk needs for a token of which nothing is in memory. The ranks are processes on
MLX's ring over loopback and share this machine's cores, so what is compared is reading, not computing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.rig.checkpoint import write_checkpoint
from benchmarks.rig.replay import (
    EXPERTS,
    FLEET,
    LATENCY_S,
    NUM_SPARSE,
    SLOTS,
    TOP,
    ReplayedModel,
    conversations,
)
from benchmarks.rig.simulated_disk import SimulatedDisk
from models.arithmetic import CPU
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.experts.exchange import Exchange
from models.experts.experts import run_through
from models.loading.loading import load_model, open_checkpoint
from server.engine.cluster.meeting import free_address
from server.engine.cluster.part import join, part_of
from server.engine.cluster.rank_messages import Welcome
from server.link.child import engine_environment
from streaming.disk.disk import DirectDisk
from streaming.store import ExpertStore

WARM_TOKENS, MEASURED_TOKENS, PROMPT_ROWS, ROUNDS = 20, 10, 64, 3
LIMIT_S = 500.0
# Of eight experts of a row the rank with most owns about five where there are two.
NUM_GATHERED, NUM_MESSAGES = 5, 300
MODULE = "benchmarks.fleet.cluster"


@dataclass(frozen=True)
class Seen:
    """What a rank saw: seconds of a step in each round, of a sweep and of a message; hits, and bytes."""

    step_s: list[float]
    hit_rate: float
    step_bytes: float
    sweep_s: float
    sweep_bytes: int
    message_s: float


def run_rank(folder: Path, welcome: Welcome, cold_s: float) -> Seen:
    """Decodes, then sweeps, as one of the ranks."""
    checkpoint, exchange = open_checkpoint(folder), None
    expert_bytes = checkpoint.experts.expert_bytes(checkpoint.experts.layers[0])
    if len(welcome.addresses) > 1:
        exchange = join(welcome, checkpoint)
        checkpoint = part_of(checkpoint, exchange.placement)
    disk = SimulatedDisk(NUM_SPARSE * TOP * expert_bytes / cold_s, LATENCY_S, DirectDisk())
    store = ExpertStore(checkpoint.experts, SLOTS, float_dtype=CPU.dtype, disk=disk, ring_slots=EXPERTS // 8)
    model = ReplayedModel(load_model(checkpoint, CPU, store, exchange=exchange), conversations("synthetic"))
    cache = model.make_cache()
    _forward(model, [0], cache)
    for _ in range(WARM_TOKENS):
        _forward(model, [1], cache)
    before, rounds = asdict(store.statistics()), list[float]()
    for _ in range(ROUNDS):
        started_s = time.monotonic()
        for _ in range(MEASURED_TOKENS):
            _forward(model, [1], cache)
        rounds.append((time.monotonic() - started_s) / MEASURED_TOKENS)
    after = store.statistics()
    hits, misses, ahead, payload = (
        asdict(after)[name] - before[name] for name in ("hits", "misses", "ahead_used", "payload_bytes")
    )
    started_s = time.monotonic()
    _forward(model, [3] * PROMPT_ROWS, model.make_cache())
    sweep_s = time.monotonic() - started_s
    sweep_bytes = store.statistics().payload_bytes - after.payload_bytes
    store.close()
    steps = ROUNDS * MEASURED_TOKENS
    message_s = _message_s(exchange) if exchange else 0.0
    return Seen(rounds, hits / (hits + misses + ahead), payload / steps, sweep_s, sweep_bytes, message_s)


def _message_s(exchange: Exchange) -> float:
    """The median time in which all ranks hear each other's outputs of a layer, as large as GLM-5.2's."""
    rows, seal = mx.zeros((NUM_GATHERED, 6144)), exchange.seal(0, np.zeros((1, TOP), np.int32))
    times = []
    for _ in range(NUM_MESSAGES):
        started_s = time.monotonic()
        mx.eval(seal.outputs(rows, NUM_GATHERED, None))
        times.append(time.monotonic() - started_s)
    return median(times)


def _forward(model: ReplayedModel, tokens: list[int], cache: SequenceCache) -> None:
    run_through(model.forward(mx.array(tokens), [Span(cache, 0, len(tokens))]))
    mx.eval([part.state for part in cache.parts])


def measure(folder: Path, num_ranks: int, cold_s: float) -> list[Seen]:
    """All ranks, each a process."""
    addresses = [free_address("127.0.0.1:0") for _ in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, "--cold", str(cold_s), "--folder", str(folder)],
            env=engine_environment() | {"CLUSTER_RANK": json.dumps([rank, addresses])},
            stdout=subprocess.PIPE,
        )
        for rank in range(num_ranks)
    ]
    try:
        return [Seen(**json.loads(rank.communicate(timeout=LIMIT_S)[0])) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cold", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        rank, addresses = json.loads(os.environ["CLUSTER_RANK"])
        print(json.dumps(asdict(run_rank(given.folder, Welcome(rank, tuple(addresses)), given.cold))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), FLEET)
        seen = {number: measure(Path(folder), number, given.cold) for number in (1, given.ranks)}
    for number, ranks in seen.items():
        for rank, one in enumerate(ranks):
            steps = ", ".join(f"{seconds * 1e3:.0f}" for seconds in one.step_s)
            print(
                f"{number} ranks, rank {rank}: step {steps} ms, hits {one.hit_rate:.3f}, "
                f"{one.step_bytes / 1e6:.2f} MB a step; sweep {one.sweep_s:.2f} s, "
                f"{one.sweep_bytes / 1e6:.1f} MB; message {one.message_s * 1e3:.2f} ms"
            )
    alone, together = seen[1][0], seen[given.ranks][0]
    print(
        f"decode {median(alone.step_s) / median(together.step_s):.2f}x, "
        f"sweep {alone.sweep_s / together.sweep_s:.2f}x"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
