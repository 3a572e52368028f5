"""The same checkpoint on other SSDs, read in parallel: `--mirror`, which may be given several times.

Stands behind the reader's seam as one disk with several sides. Each read goes to the side that will have it
done first, by what is outstanding there and by the rate that was measured of it. A side that fails is
dropped, with a line in the log, and the read is repeated on another: no request notices. A copy of which it
is not yet proven that it is equal, file by file, is not read from. Called by the
reader's threads, by its owner when a read hangs, and by the comparison that finds a difference.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import DiskError
from streaming.disk.copies import Mirror
from streaming.disk.disk import Disk, DiskFile
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp

# A side's rate is that of its last seconds of work, so that one that is throttled is noticed.
REMEMBERED_S = 1.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Side:
    """One of the disks. `reads`: the bytes that it serves now, by thread. Used under the disk's lock."""

    name: str
    disk: Disk
    reads: dict[int, int] = field(default_factory=dict)
    is_dropped: bool = False
    num_bytes: float = 0.0
    busy_s: float = 0.0
    since_s: float = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """The measured rate; None before the first read."""
        return self.num_bytes / self.busy_s if self.busy_s > 0 and self.num_bytes else None

    def start(self, thread: int, nbytes: int, now_s: float) -> None:
        """Registers a read of this thread."""
        if not self.reads:
            self.since_s = now_s
        self.reads[thread] = nbytes

    def end(self, thread: int, now_s: float, *, arrived: bool) -> None:
        """Ends the read of this thread; the bytes of one that failed say nothing about the rate."""
        nbytes = self.reads.pop(thread, None)
        if nbytes is None:
            return
        if self.busy_s > REMEMBERED_S:
            self.busy_s, self.num_bytes = self.busy_s / 2, self.num_bytes / 2
        self.busy_s += now_s - self.since_s
        self.since_s = now_s
        self.num_bytes += nbytes if arrived else 0

    def done_s(self, nbytes: int, bytes_per_s: float) -> float:
        """Returns how long a read that is asked for now takes, behind what is outstanding."""
        return (sum(self.reads.values()) + nbytes) / (self.bytes_per_s or bytes_per_s)


class MirroredDisk:
    """Opens each file of `directory` there and in each of the mirrors; `disks`: one for each, ours first.

    `clock` returns seconds: the sides' rates are measured with it.
    """

    def __init__(
        self,
        directory: Path,
        mirrors: Sequence[Mirror],
        disks: Sequence[Disk],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mirrors = tuple(mirrors)
        self._clock = clock
        names = [str(directory), *(f"--mirror {mirror.path}" for mirror in mirrors)]
        self._sides = [Side(name, disk) for name, disk in zip(names, disks, strict=True)]
        self._doubted: set[tuple[int, Path]] = set()
        self._lock = threading.Lock()
        self._last_read_s = float("-inf")

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        """Opens a file on all sides that are left; DiskError if one of those is not what it was."""
        files: dict[int, DiskFile] = {}
        try:
            for number, side in enumerate(self._sides):
                if number == 0:
                    files[0] = side.disk.open(path, stamp)
                elif not side.is_dropped:
                    mirror = self.mirrors[number - 1]
                    files[number] = side.disk.open(mirror.copy_of(path), mirror.copies[path])
        except DiskError:
            for file in files.values():
                file.close()
            raise
        return _MirroredFile(self, path, files)

    def doubt(self, number: int) -> None:
        """Reads nothing from this mirror until `trust` is told that a file of it is equal to ours."""
        with self._lock:
            self._doubted |= {(number, path) for path in self.mirrors[number - 1].copies}

    def trust(self, number: int, path: Path) -> None:
        """Reads one of our files from this mirror, too."""
        with self._lock:
            self._doubted.discard((number, path))

    @property
    def idle_s(self) -> float:
        """How long no read has been asked for."""
        with self._lock:
            return self._clock() - self._last_read_s

    def rates(self) -> Mapping[str, float]:
        """Returns the measured bytes a second of each side that is left."""
        with self._lock:
            return {side.name: side.bytes_per_s or 0.0 for side in self._sides if not side.is_dropped}

    def is_dropped(self, number: int) -> bool:
        """Whether a side, 0 for our own and from 1 on for the mirrors, is read from no more."""
        return self._sides[number].is_dropped

    def start(self, thread: int, nbytes: int, path: Path | None = None) -> int:
        """Returns the number of the side that serves the next read of a thread, of this file."""
        with self._lock:
            now_s = self._last_read_s = self._clock()
            sides = [
                (number, side)
                for number, side in enumerate(self._sides)
                if not (side.is_dropped or (number, path) in self._doubted)
            ]
            fastest = max((side.bytes_per_s or 0.0 for _, side in sides), default=0.0) or 1.0
            number, side = min(sides, key=lambda item: item[1].done_s(nbytes, fastest))
            side.start(thread, nbytes, now_s)
            return number

    def end(self, thread: int, number: int, *, arrived: bool) -> None:
        """Ends the read of a thread."""
        with self._lock:
            self._last_read_s = now_s = self._clock()
            self._sides[number].end(thread, now_s, arrived=arrived)

    def drop(self, number: int, why: object) -> bool:
        """Reads no more from this side. Returns whether another is left, without which it is kept."""
        with self._lock:
            side, doubted = self._sides[number], {doubtful for doubtful, _ in self._doubted}
            left = [
                one.name
                for index, one in enumerate(self._sides)
                if one is not side and not one.is_dropped and index not in doubted
            ]
            if left and not side.is_dropped:
                side.is_dropped = True
                log.error("%s is dropped, reading from %s alone: %s", side.name, " and ".join(left), why)
            return bool(left)

    def give_up(self, thread: int) -> bool:
        """Drops the side where the read of this thread hangs. Returns whether another can be asked."""
        with self._lock:
            now_s = self._clock()
            numbers = [number for number, side in enumerate(self._sides) if thread in side.reads]
            for number in numbers:
                self._sides[number].end(thread, now_s, arrived=False)
        return bool(numbers) and self.drop(numbers[0], "a read did not come back in time")


class _MirroredFile:
    may_repeat = True

    def __init__(self, disk: MirroredDisk, path: Path, files: Mapping[int, DiskFile]) -> None:
        self.alignment = max(file.alignment for file in files.values())
        self._disk, self._path, self._files = disk, path, files

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        thread = threading.get_ident()
        while True:
            number, arrived = self._disk.start(thread, sum(map(len, buffers)), self._path), False
            try:
                count = self._files[number].read_into(buffers, offset)
                self._files[number].check()
                arrived = True
                return count
            except InterruptedError:
                raise
            except (OSError, DiskError) as error:
                if not self._disk.drop(number, error):
                    raise
            finally:
                self._disk.end(thread, number, arrived=arrived)

    def check(self) -> None:
        """Each read was, by the side that served it."""

    def give_up(self, thread: int) -> bool:
        return self._disk.give_up(thread)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
