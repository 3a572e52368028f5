"""What a reader is asked for: reads, in batches that are waited for together, and in which order they go.

Made by whoever wants bytes and by the reader; a batch changes under the reader's lock only.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from config.errors import DiskError
from streaming.disk.disk import DiskFile
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
