"""How fast the disk reads this checkpoint's experts, and how many threads that takes.

Called once at start-up, before the slots are allocated, so that what it reads into is memory that nobody has
yet; and by `benchmarks.cost`, as the rate that the engine is held against. Plain threads that read and
forget: no queue, no slots, no conversions. They read into much memory, as slots are: behind a virtual disk
the host copies the bytes, a quarter faster to where it has just copied others.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from config.errors import DiskError
from streaming.disk.disk import MAX_ALIGNMENT, Disk, DiskFile, aligned_buffer
from streaming.disk.reader import TIMEOUT_S
from streaming.disk.reads import aligned_range, buffer_bytes
from streaming.files.floats import Bytes
from streaming.files.index import ExpertIndex
from streaming.files.read_plan import Run, largest_run_bytes, plan_runs

DEPTHS = (1, 2, 4, 8, 16, 32)
LIMIT_S = 1.8
# The fewest threads that come so near to the best: each costs a buffer, and rates vary by that much anyway.
GOOD_ENOUGH = 0.95
# More than any processor's caches hold.
MAX_MEMORY_BYTES = 512 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rate:
    num_bytes: int
    seconds: float

    @property
    def per_s(self) -> float:
        return self.num_bytes / self.seconds


@dataclass(frozen=True)
class DiskProbe:
    """`bytes_per_s` of each depth that was tried, and the depth to read with."""

    depth: int
    rates: Mapping[int, float]

    @property
    def bytes_per_s(self) -> float:
        return self.rates[self.depth]


def probe_disk(
    disk: Disk,
    index: ExpertIndex,
    max_depth: int = DEPTHS[-1],
    room_bytes: int = 0,
    *,
    limit_s: float = LIMIT_S,
    timeout_s: float = TIMEOUT_S,
) -> DiskProbe:
    """Reads experts drawn at random, none twice, at each depth up to `max_depth`.

    `room_bytes`: memory that it may read into; a buffer for each thread is taken anyway. Takes about
    `limit_s`, less where the checkpoint is small. Raises DiskError as a read does.
    """
    depths = [depth for depth in DEPTHS if depth <= max_depth]
    total = sum(index.expert_bytes(layer) for layer in index.layers) * index.num_experts
    with opened(disk, index) as files:
        runs = _fresh_runs(index)
        least = depths[-1] * buffer_bytes(largest_run_bytes(index))
        memory = aligned_buffer(max(least, min(room_bytes, MAX_MEMORY_BYTES)))
        memory.fill(0)  # page faults are not the disk's
        # Up and down again: what else the disk does at the moment should not decide.
        order = [*depths, *reversed(depths)]
        tries: dict[int, list[Rate]] = {depth: [] for depth in depths}
        for depth in order:
            some = _limited(runs, total // len(order), time.monotonic() + limit_s / len(order))
            tries[depth].append(read_bare(files, some, _shares(memory, depth), timeout_s))
    rates = {depth: _mean(tried) for depth, tried in tries.items()}
    return DiskProbe(choose_depth(rates), rates)


def _shares(memory: Bytes, depth: int) -> list[Bytes]:
    """Cuts the pieces into a part for each thread."""
    share = len(memory) // depth // MAX_ALIGNMENT * MAX_ALIGNMENT
    return [memory[thread * share : (thread + 1) * share] for thread in range(depth)]


def choose_depth(rates: Mapping[int, float]) -> int:
    """The smallest depth whose rate is good enough. `rates` by depth, ascending."""
    best = max(rates.values())
    return next(depth for depth, rate in rates.items() if rate >= GOOD_ENOUGH * best)


@contextmanager
def opened(disk: Disk, index: ExpertIndex) -> Iterator[Mapping[str, DiskFile]]:
    """The files of the experts by name of path."""
    files: dict[str, DiskFile] = {}
    try:
        for path, stamp in index.stamps.items():
            files[str(path)] = disk.open(path, stamp)
        yield files
    finally:
        for file in files.values():
            file.close()


def _mean(rates: Sequence[Rate]) -> float:
    return sum(rate.num_bytes for rate in rates) / sum(rate.seconds for rate in rates)


def read_bare(
    files: Mapping[str, DiskFile], runs: Iterator[Run], buffers: Sequence[Bytes], timeout_s: float = TIMEOUT_S
) -> Rate:
    """Reads with a thread for each buffer, from its start to its end and again; the bytes are those asked
    for, without alignment."""
    crew = _Crew(files, runs)
    threads = [threading.Thread(target=crew.work, args=(buffer,), daemon=True) for buffer in buffers]
    start_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, start_s + timeout_s - time.monotonic()))
        if thread.is_alive():
            raise DiskError(f"reading experts: no answer in {timeout_s:g} s")
    if crew.errors:
        raise crew.errors[0]
    return Rate(crew.num_bytes, time.monotonic() - start_s)


class _Crew:
    """Threads that share a list of reads; each call of `work` is one of them."""

    def __init__(self, files: Mapping[str, DiskFile], runs: Iterator[Run]) -> None:
        self.num_bytes = 0
        self.errors: list[DiskError] = []
        self._files, self._runs = files, runs
        self._lock = threading.Lock()

    def work(self, buffer: Bytes) -> None:
        at = 0
        while (run := self._next()) is not None:
            file = self._files[str(run.path)]
            start, num_bytes = aligned_range(file.alignment, run.offset, run.nbytes)
            if at + num_bytes > len(buffer):
                at = 0
            try:
                file.read_into([buffer[at : at + num_bytes]], start)
            except OSError as error:
                self.errors.append(DiskError(f"{run.path}: {error.strerror or error}"))
                return
            except DiskError as error:
                self.errors.append(error)
                return
            at += num_bytes
            with self._lock:
                self.num_bytes += run.nbytes

    def _next(self) -> Run | None:
        with self._lock:
            return None if self.errors else next(self._runs, None)


def _fresh_runs(index: ExpertIndex) -> Iterator[Run]:
    """The reads of all experts in an order of chance, each once."""
    places = [(layer, expert) for layer in index.layers for expert in range(index.num_experts)]
    for number in np.random.default_rng().permutation(len(places)):
        yield from plan_runs(index.pieces(*places[number]))


def _limited(runs: Iterator[Run], max_bytes: int, until_s: float) -> Iterator[Run]:
    """The next of the runs, at least one, while there is time and there are bytes for it."""
    while (run := next(runs, None)) is not None:
        yield run
        max_bytes -= run.nbytes
        if max_bytes <= 0 or time.monotonic() >= until_s:
            return
