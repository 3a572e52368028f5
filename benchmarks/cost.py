"""What streaming costs when nothing has to be read, and what a read costs: `python -m benchmarks.cost`.

All hits: decode with every expert in a slot of the store, synchronising at each layer, against resident
decode, interleaved token by token. Bookkeeping: `begin`, `observe` and `expect` of a layer whose experts are
all there. Bytes: payload against the experts that were missed, device against payload. Rate: the store's
reads against the start-up probe's, of the same pieces with as many threads, in interleaved blocks; of this
geometry's pieces and of pieces as large as GLM-5.2's, with scales kept as on a GPU, as they are on disk, and
as on a CPU, where they are widened. Both read into as much memory; beside them the probe's threads read into
the store's very slots (`slots`), so that only the store differs, and into one buffer each again and again
(`reused`), which some virtual disks fill faster.
"""

import argparse
import itertools
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from models.arithmetic import CPU
from models.attention.attention import Span
from models.loading.loading import Checkpoint, load_model, open_checkpoint
from streaming.disk.disk import DirectDisk, aligned_buffer
from streaming.disk.probe import Rate, opened, read_bare
from streaming.disk.reader import NUM_THREADS
from streaming.disk.reads import buffer_bytes
from streaming.eviction.policy import LeastNearlyChosen
from streaming.files.floats import Bytes
from streaming.files.index import PROJECTIONS, ExpertIndex
from streaming.files.read_plan import Run, largest_run_bytes, plan_runs
from streaming.store import ExpertStore

SIDES = ("engine", "slots", "probe", "reused")
# Experts of GLM-5.2's own size, 21 MB: pieces of 6 MB and of 0.4 MB. 1.4 GB in two layers.
WIDE = BENCH | {
    "hidden_size": 6144, "moe_intermediate_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense"] + ["sparse"] * 2, "n_routed_experts": 32, "num_experts_per_tok": 8,
    "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip


def make_store(
    checkpoint: Checkpoint, slots: int, depth: int = NUM_THREADS, float_dtype: mx.Dtype = CPU.dtype
) -> ExpertStore:
    args = checkpoint.args
    return ExpertStore(
        checkpoint.experts,
        slots,
        float_dtype=float_dtype,
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


def rate(checkpoint: Checkpoint, blocks: int, depth: int, block_s: float, float_dtype: mx.Dtype) -> None:
    """GB/s over the time that reads are outstanding: store and bare threads read the same experts in turn.

    A block is as many layers, half of the experts of each, as take the probe `block_s`. All sides read layer
    by layer and wait for each; who goes first changes, so that a disk that remembers helps all.
    """
    index, rng = checkpoint.experts, np.random.default_rng(1)
    half = index.num_experts // 2
    store = make_store(checkpoint, half, depth, float_dtype)
    buffers = [aligned_buffer(buffer_bytes(largest_run_bytes(index))) for _ in range(depth)]
    shelf = Shelf(index, half, depth)
    rates: dict[str, list[Rate]] = {name: [] for name in SIDES}
    layers = itertools.cycle(index.layers)
    with opened(DirectDisk(), index) as files:
        # Slots and buffers that were never touched would cost page faults in the first block.
        for layer in index.layers:
            store.acquire(layer, range(half))
        read_bare(files, _runs(index, index.layers[0], range(half)), buffers)
        warm = store.statistics()
        for block in range(blocks):
            done: dict[str, list[Rate]] = {name: [] for name in SIDES}
            while _total(done["probe"]).seconds < block_s:
                layer = next(layers)
                missing = sorted(_absent(store, layer, index.num_experts, rng)[:half])
                runs = list(_runs(index, layer, missing))
                sides: dict[str, Callable[[], Rate]] = {
                    "engine": partial(_engine, store, layer, missing),
                    "slots": partial(read_bare, files, iter(runs), _slots_of(store, layer, depth)),
                    "probe": partial(read_bare, files, iter(runs), shelf.next()),
                    "reused": partial(read_bare, files, iter(runs), buffers),
                }
                first = (block + len(done["probe"])) % len(SIDES)
                for name in (*SIDES[first:], *SIDES[:first]):
                    done[name].append(sides[name]())
            for name, some in done.items():
                rates[name].append(_total(some))
    print(f"experts of {index.expert_bytes(index.layers[0]) / 1e6:.1f} MB, floats kept as {float_dtype}:")
    for name in SIDES[1:]:
        _report_rate(rates["engine"], rates[name], f"{name} at depth {depth}")
    counts = store.statistics()
    payload, device = counts.payload_bytes - warm.payload_bytes, counts.device_bytes - warm.device_bytes
    expected = (counts.misses - warm.misses) * index.expert_bytes(index.layers[0])
    print(
        f"bytes: payload {payload} in {counts.num_reads - warm.num_reads} reads, of the experts missed "
        f"{expected}, device / payload {device / payload:.4f}"
    )
    store.close()


def _slots_of(store: ExpertStore, layer: int, depth: int) -> list[Bytes]:
    """The memory of the layer's slots, but for scales and biases, in whole pages, for so many threads."""
    bank = store.bank(layer)
    parts_each = -(-depth // len(PROJECTIONS))
    shares = []
    for projection in PROJECTIONS:
        whole = np.array(bank[f"{projection}.weight"], copy=False).reshape(-1).view(np.uint8)
        whole = whole[-whole.ctypes.data % mmap.PAGESIZE :]
        share = len(whole) // parts_each // mmap.PAGESIZE * mmap.PAGESIZE
        shares += [whole[part * share : (part + 1) * share] for part in range(parts_each)]
    return shares[:depth]


class Shelf:
    """Memory as large as the slots, for bare threads to read into: another part of it each time."""

    def __init__(self, index: ExpertIndex, experts: int, depth: int) -> None:
        share = experts * index.expert_bytes(index.layers[0]) // depth  # of one thread, in one turn
        self._part_bytes = buffer_bytes(share * 5 // 4 + largest_run_bytes(index))
        self._num_parts = max(2, share * len(index.layers) // self._part_bytes)
        self._memory = [aligned_buffer(self._num_parts * self._part_bytes) for _ in range(depth)]
        self._turn = 0
        for memory in self._memory:
            memory.fill(1)

    def next(self) -> list[Bytes]:
        """For each thread what was not read into for longest."""
        start = self._turn % self._num_parts * self._part_bytes
        self._turn += 1
        return [memory[start : start + self._part_bytes] for memory in self._memory]


def _report_rate(engine: Sequence[Rate], probe: Sequence[Rate], name: str) -> None:
    ratios = [e.per_s / p.per_s for e, p in zip(engine, probe, strict=True)]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    e, p = _total(engine), _total(probe)
    print(
        f"rate: engine {e.per_s / 1e9:.2f} GB/s, {name} {p.per_s / 1e9:.2f}, of all bytes "
        f"{e.per_s / p.per_s:.2f}; block by block {middle:.2f}, quartiles [{low:.2f} {high:.2f}], range "
        f"[{min(ratios):.2f} {max(ratios):.2f}] of {len(ratios)} blocks "
        f"of {e.num_bytes / len(ratios) / 1e6:.0f} MB"
    )


def _total(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(rate.num_bytes for rate in rates), sum(rate.seconds for rate in rates))


def _runs(index: ExpertIndex, layer: int, experts: Sequence[int]) -> Iterator[Run]:
    return iter([run for expert in experts for run in plan_runs(index.pieces(layer, expert))])


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
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--block-s", type=float, default=0.3)
    parser.add_argument("--depth", type=int, default=NUM_THREADS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(given.checkpoint or write_checkpoint(Path(scratch) / "bench"))
        bookkeeping(checkpoint, 2000)
        measured = [checkpoint]
        if given.checkpoint is None:
            measured.append(open_checkpoint(write_checkpoint(Path(scratch) / "wide", WIDE)))
        for one in measured:
            for float_dtype in (mx.bfloat16, mx.float32):
                rate(one, given.blocks, given.depth, given.block_s, float_dtype)
        all_hits(checkpoint, given.tokens)


if __name__ == "__main__":
    main()
