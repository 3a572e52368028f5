"""Blocks of saved KV as files of one directory, bounded in size. Knows no model.

Owned by the prefix cache. `read` may be called from any thread; everything else is called by the one thread
that writes. Several servers may share a directory: a file appears whole, by a rename, under a name that says
what is in it; whatever a server finds missing is a miss. Nothing is kept in memory about what is on disk.

Not synchronised to the medium: a process that is killed loses nothing that was renamed, and a machine that
loses power leaves files whose bytes may be wrong, which the checksum makes a miss. Last use is a file's
access time, set by us; its modification time is when it was written.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.sizes import format_size
from streaming.disk.disk import forget_pages
from streaming.files.floats import Bytes
from streaming.prefix.block_format import (
    HEADER_BYTES,
    Block,
    BlockName,
    DamagedBlock,
    decode,
    encode,
    fingerprint_of,
)

# How long a directory that is full, or was made read-only, is left alone.
RETRY_S = 300.0
# Evicting stops this far below the limit, so that not every write has to list the directory.
ROOM = 1 / 16
MAX_FILE_BYTES = 2**30
STALE_S = 3600.0
_PIN = ".pin"
_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """One block's file, by its status alone."""

    path: Path
    start: int
    nbytes: int
    used_ns: int
    written_ns: int
    is_pinned: bool


class BlockFiles:
    """The files of one directory."""

    def __init__(self, directory: Path, fingerprint: bytes, max_bytes: int) -> None:
        """Makes the directory, for its owner's eyes only: blocks hold what people wrote."""
        self.directory, self.max_bytes = directory, max_bytes
        self.fingerprint = fingerprint
        self._off_until = 0.0
        self._unlisted_bytes = 0
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.num_damaged = self.num_evicted = self.num_errors = 0
        self.bytes_written = self.bytes_read = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep_up()
        files = self.list()
        self._nbytes = sum(file.nbytes for file in files)
        self.num_pinned = sum(file.is_pinned for file in files)

    @property
    def is_writable(self) -> bool:
        """Whether writes are tried now."""
        return time.monotonic() >= self._off_until

    @property
    def nbytes(self) -> int:
        """Size of the files, as far as this server knows."""
        return self._nbytes

    def read(self, name: BlockName) -> Block | None:
        """A block, or None where there is none that can be trusted; a damaged file is deleted."""
        path = self.directory / name.file_name
        try:
            raw = _read_file(path)
            block = decode(raw, self.fingerprint, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if not _is_plain(path):
                return None
            self._count_error(f"{path} cannot be read: {error.strerror}")
            return None
        except DamagedBlock as error:
            log.warning("%s is deleted, its tokens will be computed again: %s", path, error)
            with self._lock:
                self.num_damaged += 1
            _remove(path)
            return None
        with self._lock:
            self.bytes_read += raw.size
        return block

    def is_ours(self, file: StoredFile) -> bool:
        """Whether a file is a block of this checkpoint, by its header alone."""
        try:
            with open(file.path, "rb") as opened:
                header = np.frombuffer(opened.read(HEADER_BYTES), np.uint8)
        except OSError:
            return False
        return fingerprint_of(header) == self.fingerprint

    def has(self, name: BlockName) -> bool:
        """Whether there is such a file, whole or not."""
        return _is_plain(self.directory / name.file_name)

    def write(self, block: Block) -> bool:
        """Store a block. False where the disk refused; the service goes on without."""
        if not self.is_writable:
            return False
        path = self.directory / block.name.file_name
        if path.is_dir() and not path.is_symlink():  # cannot be replaced, and is no fault of the disk
            return False
        temporary = self.directory / f".{os.getpid()}-{next(self._numbers)}.tmp"
        try:
            self.make_room(block.nbytes)
            _write_file(temporary, encode(block, self.fingerprint))
            os.replace(temporary, path)
        except OSError as error:
            _remove(temporary)
            self._switch_off(error)
            return False
        self._nbytes += block.nbytes
        self._unlisted_bytes += block.nbytes
        self.bytes_written += block.nbytes
        return True

    def make_room(self, incoming: int) -> None:
        """Evict by last use, later positions first among equals, until the newcomer fits.

        The directory is listed when our own count says that it is full, and each time a sixteenth of the
        limit has been written, because other servers write too. Room for several blocks is made at once, so
        that they do not drive each other out. OSError where pinned blocks leave none.
        """
        is_counted = self._unlisted_bytes < self.max_bytes * ROOM
        if is_counted and self._nbytes + incoming <= self.max_bytes:
            return
        files = self.list()
        self._unlisted_bytes = 0
        self._nbytes = sum(file.nbytes for file in files)
        if self._nbytes + incoming <= self.max_bytes:
            return
        goal = self.max_bytes * (1 - ROOM) - incoming
        for file in sorted(files, key=lambda file: (file.used_ns, -file.start)):
            if self._nbytes <= goal:
                return
            if not file.is_pinned and _remove(file.path):
                self._nbytes -= file.nbytes
                self.num_evicted += 1
        if self._nbytes + incoming > self.max_bytes:
            pinned = format_size(sum(file.nbytes for file in files if file.is_pinned))
            raise OSError(0, f"pinned blocks ({pinned}) leave no room")

    def use(self, chain: Iterable[BlockName]) -> None:
        """Mark the files of one conversation as used now, all with one time: ties go by position."""
        now_ns = time.time_ns()
        for name in chain:
            path = self.directory / name.file_name
            with contextlib.suppress(OSError):
                os.utime(path, ns=(now_ns, path.stat().st_mtime_ns))

    def pin(self, chain: Iterable[BlockName], is_pinned: bool = True) -> int:
        """Keep these files, or no longer, whatever else needs their room; how many there are."""
        count = 0
        for name in chain:
            marker = self.directory / (name.file_name + _PIN)
            if not is_pinned:
                count += _remove(marker)
            elif self.has(name):
                marker.touch(mode=0o600)
                count += 1
        self.num_pinned = sum(file.is_pinned for file in self.list())
        return count

    def list(self) -> list[StoredFile]:
        """All blocks of the directory, also those of other servers and other checkpoints."""
        pins, found = set(), []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(_PIN):
                    pins.add(entry.name.removesuffix(_PIN))
                elif name := BlockName.of_file(entry.name):
                    with contextlib.suppress(OSError):
                        if entry.is_file(follow_symlinks=False):  # what else has such a name is not ours
                            found.append((entry, name.start, entry.stat(follow_symlinks=False)))
        return [
            StoredFile(
                Path(entry.path), start, seen.st_size, seen.st_atime_ns, seen.st_mtime_ns, entry.name in pins
            )
            for entry, start, seen in found
        ]

    def discard(self, chain: Iterable[BlockName]) -> None:
        """Delete these blocks, pinned or not."""
        for name in chain:
            path = self.directory / name.file_name
            _remove(Path(f"{path}{_PIN}"))
            _remove(path)
        files = self.list()
        self._nbytes = sum(file.nbytes for file in files)
        self.num_pinned = sum(file.is_pinned for file in files)

    def clear(self) -> int:
        """Delete all blocks, pinned ones too; how many there were."""
        files = self.list()
        for file in files:
            _remove(Path(f"{file.path}{_PIN}"))
        count = sum(_remove(file.path) for file in files)
        self._nbytes = sum(file.nbytes for file in self.list())
        self.num_pinned = 0
        return count

    def _switch_off(self, error: OSError) -> None:
        self._off_until = time.monotonic() + RETRY_S
        self._count_error(
            f"nothing is saved in {self.directory} for the next {RETRY_S:.0f} s: {error.strerror}; "
            "requests are answered as before, what is there already is still used"
        )

    def _count_error(self, message: str) -> None:
        with self._lock:
            self.num_errors += 1
        log.error("prefix cache: %s", message)

    def _sweep_up(self) -> None:
        """Delete what writers left that died."""
        oldest = time.time() - STALE_S
        for path in self.directory.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()


def _read_file(path: Path) -> Bytes:
    # Not waiting, and following no link: whoever may write to the folder may also put a pipe there.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        size = os.fstat(fd).st_size
        if size > MAX_FILE_BYTES:
            raise DamagedBlock(f"{size} bytes are too many for a block")
        raw = np.empty(size, np.uint8)
        done = 0
        while done < size and (count := os.preadv(fd, [raw[done:].data], done)):
            done += count
        forget_pages(fd)
        return raw[:done]
    finally:
        os.close(fd)


def _is_plain(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _write_file(path: Path, parts: list[bytes | memoryview]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        forget_pages(fd)
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
        forget_pages(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
