"""Reads: what a reader is asked for, in which order reads go, and how one is carried out.

A disk without page cache wants whole aligned blocks. The reader and the probe read them with the same
functions. A batch of reads changes under the reader's lock only.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config.errors import DiskError
from streaming.disk.disk import MAX_ALIGNMENT, DiskFile
from streaming.files.floats import Bytes


class ReadDropped(DiskError):
    """The read was never started."""


class ReadClass(IntEnum):
    """Lower goes first."""

    DEMAND = 0
    LOOKAHEAD = 1
    SWEEP = 2
    PREFIX = 3


class Target(NamedTuple):
    """Memory, at this address, that bytes `at` and following of a read are put into as they are."""

    at: int
    memory: Bytes
    address: int


@dataclass(eq=False)
class Read:
    """One byte range to be read; it settles once, with its bytes delivered or with an error.

    Targets (ascending) are written to only between an `enter` that said yes and its `leave`; so is `deliver`
    called, with the buffer: bytes of targets need not be in it.
    """

    path: Path
    offset: int
    nbytes: int
    deliver: Callable[[Bytes], None]
    read_class: ReadClass = ReadClass.DEMAND
    targets: Sequence[Target] = ()
    enter: Callable[[], bool] = lambda: True
    leave: Callable[[], None] = lambda: None
    error: Exception | None = None


class Batch:
    """Reads submitted together, to be waited for together, before what they brought is used."""

    def __init__(self, reads: Sequence[Read], lock: threading.RLock) -> None:
        self.reads = reads
        self.num_pending = len(reads)
        self.has_failed = False
        self.changed = threading.Condition(lock)
        self._is_checked = False

    def check(self, files: Mapping[Path, DiskFile]) -> None:
        """Once all has settled: none of it is good if a file is not the one any more that was opened."""
        if self._is_checked:
            return
        self._is_checked = True
        try:
            for path in {read.path for read in self.reads}:
                files[path].check()
        except DiskError as error:
            for read in self.reads:
                read.error = read.error or error


@dataclass(eq=False)
class Task:
    """A read in the reader's queue or in the hands of one of its threads; `order` is that of arrival."""

    read: Read
    batch: Batch
    order: int
    started_s: float = 0.0


@dataclass
class ReadStatistics:
    """`busy_s`: time during which any read was outstanding; `device_bytes`: with what alignment adds."""

    num_reads: int = 0
    payload_bytes: int = 0
    device_bytes: int = 0
    busy_s: float = 0.0
    num_timeouts: int = 0


# As long as a layer of a decode step may compute before it asks for the next experts. A sweep has its full
# depth again for most of the time between two steps.
RECENT_S = 0.3


class Precedence:
    """Limits background reads while a decode step waits for its own.

    One per reader; called under its lock.
    """

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        # Two keep a disk busy that serves one at a time.
        self._most, self._clock = max(2, num_threads // 4), clock
        self._num_background = 0
        self._last_demand_s = -RECENT_S

    def note(self, read_class: ReadClass) -> None:
        """A read of this class was asked for, hastened, or came back."""
        if read_class == ReadClass.DEMAND:
            self._last_demand_s = self._clock()

    def pause_s(self, read_class: ReadClass) -> float:
        """How long a read of this class waits unless another ends before; 0: it may start."""
        if read_class < ReadClass.SWEEP or self._num_background < self._most:
            return 0.0
        return max(0.0, self._last_demand_s + RECENT_S - self._clock())

    def start(self, read_class: ReadClass) -> bool:
        """A read starts; whether it counts, so that its end must be told."""
        counts = read_class >= ReadClass.SWEEP
        self._num_background += counts
        return counts

    def end(self) -> None:
        """A read that counted ended, or was given up."""
        self._num_background -= 1


class Scatter(NamedTuple):
    """What a read fills, one after the other, and what is copied then: from the second into the first."""

    filled: list[Bytes]
    copies: list[tuple[Bytes, Bytes]]
    is_direct: bool  # some of `filled` is memory of targets


def buffer_bytes(max_read_bytes: int) -> int:
    """One thread's buffer: room for the largest read wherever it starts."""
    return -(-max_read_bytes // MAX_ALIGNMENT) * MAX_ALIGNMENT + 2 * MAX_ALIGNMENT


def aligned_range(alignment: int, offset: int, nbytes: int) -> tuple[int, int]:
    """Start and length of the aligned read that covers `nbytes` at `offset`."""
    start = offset // alignment * alignment
    return start, -(-(offset - start + nbytes) // alignment) * alignment


def perform(read: Read, file: DiskFile, buffer: Bytes, start: int, is_wanted: Callable[[], bool]) -> None:
    """Reads what `buffer` holds from `start` on and puts what the read wants of it where it belongs.

    `is_wanted` is asked once the bytes are there. DiskError says what could not be read.
    """
    lead = read.offset - start
    # A hung read that comes back late would write over the expert that lies there then.
    filled, copies, is_inside = scatter(
        buffer, lead, read.targets, None if file.may_repeat else file.alignment
    )
    if is_inside and not read.enter():
        return  # nobody wants it any more
    try:
        read_fully(file, filled, start, lead + read.nbytes)
        if is_wanted() and (is_inside or read.enter()):
            is_inside = True
            for into, what in copies:
                np.copyto(into, what)
            read.deliver(buffer[lead : lead + read.nbytes])
    except OSError as error:
        raise DiskError(
            f"{read.path}: reading {read.nbytes} bytes at {read.offset}: {error.strerror or error}"
        ) from error
    finally:
        if is_inside:
            read.leave()


def scatter(buffer: Bytes, lead: int, targets: Sequence[Target], alignment: int | None) -> Scatter:
    """How an aligned read that starts `lead` bytes before what is wanted goes into its targets.

    Of each, whole blocks that lie in memory as they lie on disk are read straight into it; the others come by
    way of their places in the buffer, and so does everything where `alignment` is None.
    """
    filled: list[Bytes] = []
    copies: list[tuple[Bytes, Bytes]] = []
    done = 0
    for target in targets:
        first, memory = lead + target.at, target.memory
        last = first + len(memory)
        if not alignment or (target.address - first) % alignment or last - first < 2 * alignment:
            copies.append((memory, buffer[first:last]))
            continue
        start, stop = -(-first // alignment) * alignment, last // alignment * alignment
        if done < start:
            filled.append(buffer[done:start])
        filled.append(memory[start - first : stop - first])
        done = stop
        if first < start:
            copies.append((memory[: start - first], buffer[first:start]))
        if stop < last:
            copies.append((memory[stop - first :], buffer[stop:last]))
    if done < len(buffer):
        filled.append(buffer[done:])
    return Scatter(filled, copies, done > 0)


def read_fully(file: DiskFile, buffers: Sequence[Bytes], offset: int, num_needed: int) -> None:
    """Reads until `num_needed` bytes are there, going on after short reads from the last aligned byte."""
    done = 0
    while done < num_needed:
        try:
            count = file.read_into(_behind(buffers, done) if done else buffers, offset + done)
        except InterruptedError:
            continue
        if done + count >= num_needed:
            return
        resume = (done + count) // file.alignment * file.alignment
        if resume <= done:
            raise OSError(f"the file ends {num_needed - done - count} bytes early")
        done = resume


def _behind(buffers: Sequence[Bytes], num_bytes: int) -> list[Bytes]:
    """The rest of the buffers behind their first bytes."""
    left: list[Bytes] = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left
