"""Files opened past the page cache: the seam between the reader and the disk.

`Disk` is what the reader sees; tests and the simulated disk put their own behind it. `DirectDisk` is the
real one: O_DIRECT on Linux, F_NOCACHE on macOS. Its files are read by the reader's threads, several at a
time.

Based on, for macOS (not run there by us): fcntl(2) F_NOCACHE, and reports that a read which is not aligned to
the 16 KiB page takes the cached path.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from config.errors import CheckpointChanged, DiskError
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp
from streaming.files.marks import FileMark

log = logging.getLogger(__name__)

# The largest alignment that a file asks for: the page of Apple silicon. Linux disks ask for 512 or 4,096.
MAX_ALIGNMENT = 16_384

CHANGED = "{} was replaced or changed since start-up; restart the server"


class DiskFile(Protocol):
    """One open file. Offset, lengths and addresses of a read are multiples of `alignment`.

    `may_repeat`: a read that hangs may be asked for again while the first can still come back.
    """

    alignment: int
    may_repeat: bool

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        """Reads from `offset` on, at most what the buffers hold, filled one after the other.

        Returns how many bytes, 0 at the end of the file.
        """
        ...

    def check(self) -> None:
        """DiskError if what was read until now may be of another file than was opened."""
        ...

    def give_up(self, thread: int) -> bool:
        """The read of that thread does not come back; whether asking again may help, with another disk."""
        ...

    def close(self) -> None: ...


class Disk(Protocol):
    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        """Opens a file that must still be the one that `stamp` describes; DiskError if not."""
        ...


class DirectDisk:
    """The machine's own disks, page cache bypassed where the file system allows it."""

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        try:
            fd, alignment = _open_direct(path)
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error
        try:
            mark = FileMark.of(path)
            if not stamp == mark.stamp == FileStamp.from_stat(os.fstat(fd)):
                raise CheckpointChanged(CHANGED.format(path))
        except DiskError:
            os.close(fd)
            raise
        return _File(path, fd, alignment, mark)


class _File:
    may_repeat = False

    def __init__(self, path: Path, fd: int, alignment: int, mark: FileMark) -> None:
        self.alignment = max(alignment, 1)
        self._is_buffered = alignment == 0
        self._path = path
        self._fd = fd
        self._mark = mark

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        count = os.preadv(self._fd, [buffer.data for buffer in buffers], offset)
        if self._is_buffered and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def give_up(self, thread: int) -> bool:
        return False

    def check(self) -> None:
        stamp = FileStamp.from_stat(os.fstat(self._fd))
        if stamp == self._mark.stamp:
            return
        now = FileMark.of(self._path)
        if now.stamp != stamp or stamp.inode != self._mark.stamp.inode or self._mark.content != now.content:
            raise CheckpointChanged(CHANGED.format(self._path))
        self._mark = now  # it was only touched

    def close(self) -> None:
        os.close(self._fd)


def _open_direct(path: Path) -> tuple[int, int]:
    """A descriptor and the alignment that its reads need; alignment 0 means through the page cache."""
    if sys.platform == "darwin":
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return fd, MAX_ALIGNMENT
    if hasattr(os, "O_DIRECT"):
        # Some file systems refuse O_DIRECT when the file is opened, others at the first read.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            if alignment := _probe_alignment(fd):
                return fd, alignment
            os.close(fd)
    log.warning("%s: the file system takes no direct reads; reading through the page cache", path)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0


def _probe_alignment(fd: int) -> int | None:
    """The smallest alignment at which offset, length and address of a direct read are taken."""
    for alignment in (512, 4096):
        buffer = aligned_buffer(2 * alignment)[alignment:]
        with contextlib.suppress(OSError):
            os.preadv(fd, [buffer.data], alignment)
            return alignment
    return None


def aligned_buffer(num_bytes: int) -> Bytes:
    """Zeroed memory that starts on a page. Pages that are never touched cost nothing."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def forget_pages(fd: int) -> None:
    """Lets the system drop an open file's pages; on macOS what is read next passes the cache (not run by us).

    Memory is what experts are short of, and a file that is verified must come from the medium.
    """
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
