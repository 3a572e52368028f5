"""What streaming costs when nothing has to be read, and what a read costs: `python -m benchmarks.cost`.

All hits: decode with every expert in a slot of the store, synchronising at each layer, against resident
decode, interleaved token by token. Bookkeeping: `begin`, `observe` and `expect` of a layer whose experts are
all there. Bytes: payload against the experts that were missed, device against payload. Rate: the store's
reads against bare reads of the same pieces with as many threads, in interleaved blocks.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.checkpoint import write_checkpoint
from models.arithmetic import CPU
from models.attention import Span
from models.loading import Checkpoint, load_model, open_checkpoint
from streaming.disk import DirectDisk, aligned_buffer
from streaming.index import ExpertIndex
from streaming.policy import LeastNearlyChosen
from streaming.reader import NUM_THREADS
from streaming.runs import Run, largest_run_bytes, plan_runs
from streaming.store import ExpertStore


def make_store(checkpoint: Checkpoint, slots: int) -> ExpertStore:
    args = checkpoint.args
    return ExpertStore(
        checkpoint.experts,
        slots,
        float_dtype=CPU.dtype,
        make_policy=lambda: LeastNearlyChosen(args.n_routed_experts, args.num_experts_per_tok),
    )


def all_hits(checkpoint: Checkpoint, num_tokens: int) -> None:
    """Both models in memory at once, one token of each in turn."""
    steps: dict[str, Callable[[int], None]] = {}
    for name in ("resident", "streamed"):
        store = make_store(checkpoint, checkpoint.args.n_routed_experts)
        if name == "resident":
            store.load_all()
        else:
            for layer in checkpoint.experts.layers:
                store.acquire(layer, range(checkpoint.experts.num_experts))
        steps[name] = _decoder(checkpoint, store)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for token in range(num_tokens):
        for name, step in steps.items():
            start_s = time.perf_counter()
            step(token)
            seconds[name].append(time.perf_counter() - start_s)
    resident, streamed = (np.array(seconds[name][2:]) for name in ("resident", "streamed"))
    ratios = np.sort(resident / streamed)
    print(
        f"all hits: resident {1000 * median(resident):.1f} ms, streamed {1000 * median(streamed):.1f} ms "
        f"a token; streamed / resident speed {median(ratios):.3f}, quartiles [{ratios[len(ratios) // 4]:.3f} "
        f"{ratios[3 * len(ratios) // 4]:.3f}] of {len(ratios)} pairs"
    )


def _decoder(checkpoint: Checkpoint, store: ExpertStore) -> Callable[[int], None]:
    model = load_model(checkpoint, CPU, store)
    cache = model.make_cache()

    def step(token: int) -> None:
        hidden = model(mx.array([token + 5]), [Span(cache, 0, 1)])
        mx.eval(model.logits(hidden))

    return step


def bookkeeping(checkpoint: Checkpoint, rounds: int) -> None:
    args, rng = checkpoint.args, np.random.default_rng(0)
    store = make_store(checkpoint, args.n_routed_experts)
    layer = checkpoint.experts.layers[0]
    store.acquire(layer, range(args.n_routed_experts))
    seconds = []
    for _ in range(rounds):
        experts = sorted(rng.choice(args.n_routed_experts, args.num_experts_per_tok, replace=False).tolist())
        scores = rng.standard_normal((1, args.n_routed_experts)).astype(np.float32)
        start_s = time.perf_counter()
        store.observe(layer, scores)
        store.expect(layer, [[expert] for expert in experts])
        store.finish(store.begin(layer, experts))
        seconds.append(time.perf_counter() - start_s)
    micro = np.sort(np.array(seconds) * 1e6)
    print(
        f"bookkeeping of a layer: median {median(micro):.0f} microseconds, quartiles "
        f"[{micro[rounds // 4]:.0f} {micro[3 * rounds // 4]:.0f}]"
    )
    store.close()


def rate(checkpoint: Checkpoint, blocks: int, experts_per_block: int) -> None:
    """GB/s over the time that reads are outstanding, store and bare threads in turn, fresh experts each."""
    index, rng = checkpoint.experts, np.random.default_rng(1)
    store = make_store(checkpoint, experts_per_block)
    order = [(layer, e) for layer in index.layers for e in range(index.num_experts)]
    ratios, engine, probe = [], [], []
    for _ in range(blocks):
        layer = int(rng.choice(index.layers))
        ids = rng.choice(index.num_experts, experts_per_block, replace=False)
        before = store.statistics()
        missing = [int(e) for e in np.sort(ids)]
        store.acquire(layer, missing)
        after = store.statistics()
        num_bytes, seconds = after.device_bytes - before.device_bytes, after.read_s - before.read_s
        others = [order[i] for i in rng.choice(len(order), experts_per_block, replace=False)]
        runs = [run for where in others for run in plan_runs(index.pieces(*where))]
        probe.append(_bare(index, runs) / 1e9)
        if num_bytes:
            engine.append(num_bytes / seconds / 1e9)
            ratios.append(engine[-1] / probe[-1])
    counts = store.statistics()
    expected = counts.misses * index.expert_bytes(index.layers[0])
    print(
        f"rate: engine {median(engine):.2f} GB/s, probe {median(probe):.2f} GB/s, ratio median "
        f"{median(ratios):.2f} [{min(ratios):.2f} {max(ratios):.2f}] of {len(ratios)} blocks"
    )
    print(
        f"bytes: payload {counts.payload_bytes}, of the experts missed {expected}, "
        f"device / payload {counts.device_bytes / counts.payload_bytes:.4f}"
    )
    store.close()


def _bare(index: ExpertIndex, runs: list[Run], depth: int = NUM_THREADS) -> float:
    """Bytes a second of plain threads that read and forget."""
    disk = DirectDisk()
    files = {path: disk.open(path, stamp) for path, stamp in index.stamps.items()}
    queue: SimpleQueue[Run] = SimpleQueue()
    for run in runs:
        queue.put(run)
    buffers = [aligned_buffer(largest_run_bytes(index) + 2 * 16384) for _ in range(depth)]

    def work(number: int) -> None:
        while True:
            try:
                run = queue.get_nowait()
            except Empty:
                return
            file = files[run.path]
            start = run.offset // file.alignment * file.alignment
            end = -(-(run.offset + run.nbytes) // file.alignment) * file.alignment
            file.read_into(buffers[number][: end - start], start)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(depth)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start_s
    for file in files.values():
        file.close()
    return sum(run.nbytes for run in runs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(given.checkpoint or write_checkpoint(Path(scratch) / "bench"))
        bookkeeping(checkpoint, 2000)
        rate(checkpoint, 12, 16)
        all_hits(checkpoint, given.tokens)


if __name__ == "__main__":
    main()
