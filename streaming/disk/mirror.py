"""The same checkpoint on a second SSD, read in parallel: `--mirror`.

Stands behind the reader's seam as one disk with two sides. Each read goes to the side that has fewer bytes
outstanding, so that a faster disk serves more of them. A side that fails is dropped, with a line in the log,
and the read is repeated on the other: no request notices. Called by the reader's threads, and by its owner
when a read hangs.
"""

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import CheckpointError, DiskError
from streaming.disk.disk import Disk, DiskFile
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp

# Bytes compared at the start, in the middle and at the end of each file.
SAMPLE_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Side:
    """One of the two disks; `reads`: what it serves now, by thread."""

    name: str
    disk: Disk
    reads: dict[int, int] = field(default_factory=dict)
    is_dropped: bool = False

    @property
    def outstanding_bytes(self) -> int:
        return sum(self.reads.values())


class MirroredDisk:
    """Opens each file of `directory` there and in `mirror`, whose files are the `copies` that were found."""

    def __init__(
        self, directory: Path, mirror: Path, copies: Mapping[Path, FileStamp], disk: Disk, second: Disk
    ) -> None:
        self._directory, self._mirror, self._copies = directory, mirror, dict(copies)
        self._sides = (Side(str(directory), disk), Side(f"--mirror {mirror}", second))
        self._lock = threading.Lock()

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        copy = self._mirror / path.relative_to(self._directory)
        first, second = self._sides
        opened = first.disk.open(path, stamp)
        try:
            return _MirroredFile(self, (opened, second.disk.open(copy, self._copies[path])))
        except DiskError:
            opened.close()
            raise

    def start(self, nbytes: int) -> int:
        """The number of the side that serves this thread's next read."""
        with self._lock:
            number, side = min(
                ((number, side) for number, side in enumerate(self._sides) if not side.is_dropped),
                key=lambda item: item[1].outstanding_bytes,
            )
            side.reads[threading.get_ident()] = nbytes
            return number

    def end(self, number: int) -> None:
        with self._lock:
            self._sides[number].reads.pop(threading.get_ident(), None)

    def drop(self, number: int, why: object) -> bool:
        """Reads no more from this side; whether the other is left."""
        with self._lock:
            side, other = self._sides[number], self._sides[1 - number]
            if other.is_dropped:
                return False
            if not side.is_dropped:
                side.is_dropped = True
                log.error("%s is dropped, reading from %s alone: %s", side.name, other.name, why)
            return True

    def give_up(self, thread: int) -> bool:
        """The read of this thread hangs; whether another side can be asked."""
        with self._lock:
            numbers = [number for number, side in enumerate(self._sides) if thread in side.reads]
            for number in numbers:
                del self._sides[number].reads[thread]
        return bool(numbers) and self.drop(numbers[0], "a read did not come back in time")


class _MirroredFile:
    may_repeat = True

    def __init__(self, disk: MirroredDisk, files: tuple[DiskFile, DiskFile]) -> None:
        self.alignment = max(file.alignment for file in files)
        self._disk, self._files = disk, files

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        while True:
            number = self._disk.start(sum(map(len, buffers)))
            try:
                count = self._files[number].read_into(buffers, offset)
                self._files[number].check()
                return count
            except InterruptedError:
                raise
            except (OSError, DiskError) as error:
                if not self._disk.drop(number, error):
                    raise
            finally:
                self._disk.end(number)

    def check(self) -> None:
        """Each read was, by the side that served it."""

    def give_up(self, thread: int) -> bool:
        return self._disk.give_up(thread)

    def close(self) -> None:
        for file in self._files:
            file.close()


def find_copies(directory: Path, mirror: Path, paths: Iterable[Path]) -> dict[Path, FileStamp]:
    """What each file's copy in `mirror` is now. CheckpointError where it is missing or another one.

    Compared are the size, the header and samples of the tensors: reading all of it would take minutes.
    """
    if not os.path.isdir(mirror):
        raise CheckpointError(f"--mirror {mirror}: there is no such folder")
    copies = {path: _check_copy(path, mirror / path.relative_to(directory)) for path in paths}
    first = next(iter(copies), None)
    if first is not None and first.stat().st_dev == (mirror / first.relative_to(directory)).stat().st_dev:
        log.warning("--mirror %s is on the same file system as %s: nothing is gained", mirror, directory)
    return copies


def _check_copy(path: Path, copy: Path) -> FileStamp:
    try:
        with open(path, "rb") as ours, open(copy, "rb") as theirs:
            sizes = [file.seek(0, 2) for file in (ours, theirs)]
            if sizes[0] != sizes[1]:
                raise CheckpointError(
                    f"--mirror: {copy} has {sizes[1]} bytes, {path} has {sizes[0]}; copy the checkpoint again"
                )
            stamp = FileStamp.from_path(copy)
            if stamp.inode == FileStamp.from_path(path).inode and copy.samefile(path):
                raise CheckpointError(f"--mirror: {copy} is {path} itself; name a copy on another disk")
            ours.seek(0)
            header = 8 + int.from_bytes(ours.read(8), "little")
            places = [(0, header)]
            places += [(start, SAMPLE_BYTES) for start in (header, (header + sizes[0]) // 2, sizes[0])]
            for start, nbytes in places:
                at = max(0, min(start, sizes[0] - nbytes))
                ours.seek(at)
                theirs.seek(at)
                if ours.read(nbytes) != theirs.read(nbytes):
                    raise CheckpointError(
                        f"--mirror: {copy} differs from {path} at byte {at}; it is not the same checkpoint"
                    )
            return stamp
    except OSError as error:
        where = error.filename or copy
        raise CheckpointError(f"--mirror: {where}: {error.strerror}; copy the checkpoint there") from error
