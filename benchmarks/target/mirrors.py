"""What several disks give together: `python -m benchmarks.target.mirrors [--rounds 3]`.

A store reads all experts of a small checkpoint from simulated disks of unequal rate. Prints the bytes a
second while all of them had work, of the sum of their rates: threads, clocks and sleeps are real, so that a
busy machine shows less. `tests/streaming/disk/test_mirror.py` counts the same without a clock.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.rig.simulated_disk import SimulatedDisk
from streaming.disk.copies import find_copies
from streaming.disk.mirror import MirroredDisk
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import stacked, write_safetensors

NUM_EXPERTS = 40
RATES = [(12e6, 12e6), (18e6, 6e6), (6e6, 18e6), (12e6, 6e6, 3e6), (5e6, 5e6, 5e6, 15e6)]


def make_copies(parent: Path, number: int) -> list[Path]:
    folders = [parent / str(copy) for copy in range(number)]
    folders[0].mkdir()
    experts = stacked(np.random.default_rng(0), [1, 2], NUM_EXPERTS, {"weight": ("F32", (256, 128))})
    write_safetensors(folders[0] / "model.safetensors", experts)
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    return folders


def rate_together(disks: Sequence[SimulatedDisk]) -> float:
    """Bytes a second of all disks, while all of them had work."""
    begun_s = max(disk.services[0].start_s for disk in disks)
    ended_s = min(disk.services[-1].end_s for disk in disks)
    served = [service for disk in disks for service in disk.services]
    inside = [
        max(0.0, min(one.end_s, ended_s) - max(one.start_s, begun_s)) / (one.end_s - one.start_s)
        for one in served
    ]
    return sum(share * one.nbytes for share, one in zip(inside, served, strict=True)) / (ended_s - begun_s)


def measure(folders: Sequence[Path], rates: Sequence[float]) -> float:
    """Returns the share of the sum of the rates that was reached."""
    disks = [SimulatedDisk(rate) for rate in rates]
    index = ExpertIndex.from_entries(read_headers(folders[0]))
    mirrors = [find_copies(folders[0], folder, index.stamps) for folder in folders[1:]]
    disk = MirroredDisk(folders[0], mirrors, disks)
    store = ExpertStore(index, NUM_EXPERTS, float_dtype=mx.float32, disk=disk, num_threads=12)
    for layer in index.layers:
        store.acquire(layer, range(NUM_EXPERTS))
    store.close()
    return rate_together(disks) / sum(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each set of disks is measured")
    rounds = parser.parse_args().rounds
    print(f"share of the sum of the rates, median of {rounds} (lowest to highest)")
    for rates in RATES:
        with tempfile.TemporaryDirectory() as parent:
            folders = make_copies(Path(parent), len(rates))
            shares = sorted(measure(folders, rates) for _ in range(rounds))
        disks = " + ".join(f"{rate / 1e6:.0f}" for rate in rates)
        print(f"{disks} MB/s: {statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f})")


if __name__ == "__main__":
    main()
