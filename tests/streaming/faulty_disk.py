"""A disk that goes wrong on command, behind the reader's seam."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from streaming.disk.disk import DirectDisk, DiskFile
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp

# Given the read's number, its first buffer and its offset: a count of bytes, or None to read properly.
Fault = Callable[[int, Bytes, int], int | None]


class FaultyDisk:
    """Reads through the real disk, except where `fault` says otherwise."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.num_reads = 0
        self._lock = threading.Lock()

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        return _FaultyFile(self, DirectDisk().open(path, stamp))

    def next_number(self) -> int:
        with self._lock:
            self.num_reads += 1
            return self.num_reads


class _FaultyFile:
    may_repeat = False

    def __init__(self, disk: FaultyDisk, file: DiskFile) -> None:
        self.alignment = file.alignment
        self._disk = disk
        self._file = file

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        number = self._disk.next_number()
        count = self._disk.fault(number, buffers[0], offset) if self._disk.fault else None
        return self._file.read_into(buffers, offset) if count is None else count

    def check(self) -> None:
        self._file.check()

    def give_up(self, thread: int) -> bool:
        return False

    def close(self) -> None:
        self._file.close()
