"""What streaming costs when nothing has to be read, and what a read costs: `python -m benchmarks.cost`.

All hits: decode with every expert in a slot of the store, synchronising at each layer, against resident
decode, interleaved token by token. Bookkeeping: `begin`, `observe` and `expect` of a layer whose experts are
all there. Bytes: payload against the experts that were missed, device against payload. Rate: the store's
reads against the start-up probe's, of the same pieces with as many threads, in interleaved blocks.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.checkpoint import write_checkpoint
from models.arithmetic import CPU
from models.attention import Span
from models.loading import Checkpoint, load_model, open_checkpoint
from streaming.aligned import buffer_bytes
from streaming.disk import DirectDisk, aligned_buffer
from streaming.policy import LeastNearlyChosen
from streaming.probe import Rate, opened, read_bare
from streaming.reader import NUM_THREADS
from streaming.runs import largest_run_bytes, plan_runs
from streaming.store import ExpertStore


def make_store(checkpoint: Checkpoint, slots: int, depth: int = NUM_THREADS) -> ExpertStore:
    args = checkpoint.args
    return ExpertStore(
        checkpoint.experts,
        slots,
        float_dtype=CPU.dtype,
        make_policy=lambda: LeastNearlyChosen(args.n_routed_experts, args.num_experts_per_tok),
        num_threads=depth,
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
    here = args.n_routed_experts - 1  # or there would be nothing to look ahead for
    store = make_store(checkpoint, here)
    layer = checkpoint.experts.layers[0]
    store.acquire(layer, range(here))
    seconds = []
    for _ in range(rounds):
        experts = sorted(rng.choice(here, args.num_experts_per_tok, replace=False).tolist())
        scores = rng.standard_normal((1, args.n_routed_experts)).astype(np.float32)
        start_s = time.perf_counter()
        if store.watches_scores(layer):
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


def rate(checkpoint: Checkpoint, blocks: int, experts_per_block: int, depth: int) -> None:
    """GB/s over the time that reads are outstanding: store and bare threads read the same experts in turn.

    Who goes first alternates, so that a disk that remembers helps both.
    """
    index, rng = checkpoint.experts, np.random.default_rng(1)
    store = make_store(checkpoint, experts_per_block, depth)
    buffers = [aligned_buffer(buffer_bytes(largest_run_bytes(index))) for _ in range(depth)]
    rates: dict[str, list[Rate]] = {"engine": [], "probe": []}
    with opened(DirectDisk(), index) as files:
        for block in range(blocks):
            layer = index.layers[block % len(index.layers)]
            missing = _absent(store, layer, index.num_experts, rng)[:experts_per_block]
            runs = [run for expert in missing for run in plan_runs(index.pieces(layer, expert))]
            sides: dict[str, Callable[[], Rate]] = {
                "engine": partial(_engine, store, layer, sorted(missing)),
                "probe": partial(read_bare, files, iter(runs), buffers),
            }
            for name in sorted(sides, reverse=bool(block % 2)):
                rates[name].append(sides[name]())
    ratios = [e.per_s / p.per_s for e, p in zip(rates["engine"], rates["probe"], strict=True)]
    overall = {
        name: sum(r.num_bytes for r in some) / sum(r.seconds for r in some) for name, some in rates.items()
    }
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(
        f"rate at depth {depth}: engine {overall['engine'] / 1e9:.2f} GB/s, probe "
        f"{overall['probe'] / 1e9:.2f}, of all bytes {overall['engine'] / overall['probe']:.2f}; "
        f"block by block {middle:.2f}, quartiles [{low:.2f} {high:.2f}], range "
        f"[{min(ratios):.2f} {max(ratios):.2f}] of {len(ratios)} blocks"
    )
    counts = store.statistics()
    expected = counts.misses * index.expert_bytes(index.layers[0])
    print(
        f"bytes: payload {counts.payload_bytes}, of the experts missed {expected}, "
        f"device / payload {counts.device_bytes / counts.payload_bytes:.4f}"
    )
    store.close()


def _absent(store: ExpertStore, layer: int, num_experts: int, rng: np.random.Generator) -> list[int]:
    books = store._layers[layer].books
    return [int(e) for e in rng.permutation(num_experts) if int(e) not in books]


def _engine(store: ExpertStore, layer: int, experts: Sequence[int]) -> Rate:
    before = store.statistics()
    store.acquire(layer, experts)
    after = store.statistics()
    return Rate(after.payload_bytes - before.payload_bytes, after.read_s - before.read_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--depth", type=int, default=NUM_THREADS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(given.checkpoint or write_checkpoint(Path(scratch) / "bench"))
        bookkeeping(checkpoint, 2000)
        rate(checkpoint, given.blocks, 24, given.depth)
        all_hits(checkpoint, given.tokens)


if __name__ == "__main__":
    main()
