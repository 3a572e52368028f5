"""How fast host bytes reach the GPU, by several ways: `python -m benchmarks.gpu.copy_rate [FOLDER]`.

With a checkpoint's folder also through its store, from disk to slot: experts as holes cost the disk nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from models.arithmetic import choose_arithmetic
from models.loading.loading import open_checkpoint
from streaming.device_copy import HostRows, copy_to_device, fill_slots
from streaming.store import ExpertStore

NUM_SLOTS, ROWS, ROW_BYTES = 64, 6, 20 * 2**20
SLOTS = (1, 8, 9, 20, 33, 60)
EXPERTS_AT_ONCE = (3, 16)  # what a step misses in one layer; what is staged together


def measure(name: str, copy: Callable[[], None], nbytes: int, rounds: int = 5) -> None:
    copy()
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        copy()
        rates.append(nbytes / (time.perf_counter() - started) / 1e9)
    print(f"{name}: {statistics.median(rates):.1f} GB/s ({min(rates):.1f} to {max(rates):.1f})", flush=True)


def measure_ways() -> None:
    bank = mx.zeros((NUM_SLOTS, ROW_BYTES // 4), mx.uint32)
    rows = HostRows(ROWS, (ROW_BYTES // 4,), np.uint32)
    rows.array[...] = np.random.default_rng(0).integers(0, 2**32, rows.array.shape, np.uint32)

    def through(take: Callable[[int], mx.array]) -> Callable[[], None]:
        def copy() -> None:
            for row, slot in enumerate(SLOTS):
                bank[slot] = take(row)
            mx.eval(bank)

        return copy

    nbytes = rows.array.nbytes
    measure("mx.array of contiguous rows, not read by the GPU", lambda: mx.eval(mx.array(rows.array)), nbytes)
    measure("mx.array into the bank", through(lambda row: mx.array(rows.array[row])), nbytes)
    measure("mx.load into the bank", through(lambda row: copy_to_device(rows.array[row])), nbytes)
    row_of = {slot: row for row, slot in enumerate(SLOTS)}
    measure("as the store does, into the bank", lambda: fill_slots([bank], [rows], row_of), nbytes)


def measure_store(folder: Path) -> None:
    checkpoint, arithmetic = open_checkpoint(folder), choose_arithmetic()
    index = checkpoint.experts
    layer = index.layers[0]
    store = ExpertStore(index, max(EXPERTS_AT_ONCE), float_dtype=arithmetic.dtype)
    for count in EXPERTS_AT_ONCE:
        starts = iter(range(0, index.num_experts, count))

        def bring(starts: Iterator[int] = starts, count: int = count) -> None:
            start = next(starts)
            store.acquire(layer, range(start, start + count))

        measure(
            f"{count} experts through the store, disk included", bring, count * index.expert_bytes(layer), 10
        )
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args()
    measure_ways()
    if options.folder:
        measure_store(options.folder)


if __name__ == "__main__":
    main()
