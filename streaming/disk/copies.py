"""Whether a folder holds the same checkpoint, by its sizes, its headers and a sample of every tensor.

Called when the model is opened, before anything is read from a mirror. Reading all of it would take minutes:
`streaming/disk/comparison.py` does that later.
"""

import hashlib
import logging
import os
import random
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config.errors import CheckpointError
from streaming.files.headers import FileStamp, read_header

# Bytes compared of each tensor, at its start, at its end and in between, and at the end of each file.
SAMPLE_BYTES = 4096
# Samples are read at random places: some disks serve many at a time only.
SAMPLERS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mirror:
    """A folder whose files are copies of those in `directory`; `copies`: what the copy of each is now."""

    directory: Path
    path: Path
    copies: Mapping[Path, FileStamp]

    def copy_of(self, path: Path) -> Path:
        """Returns where the copy of one of our files lies."""
        return self.path / path.relative_to(self.directory)

    def identity(self) -> str:
        """Returns a name for these copies of these files as they are now, by their stamps."""
        stamps = [(str(path), FileStamp.from_path(path), copy) for path, copy in sorted(self.copies.items())]
        return hashlib.sha256(f"{self.path} {stamps}".encode()).hexdigest()


def find_copies(directory: Path, mirror: Path, paths: Iterable[Path]) -> Mirror:
    """Finds each file's copy in `mirror`. CheckpointError where it is missing or another one."""
    if not os.path.isdir(mirror):
        raise CheckpointError(f"--mirror {mirror}: there is no such folder")
    paths = list(paths)
    with ThreadPoolExecutor(SAMPLERS) as samplers:
        found = samplers.map(lambda path: _check_copy(path, mirror / path.relative_to(directory)), paths)
        copies = dict(zip(paths, found, strict=True))
    first = next(iter(copies), None)
    if first is not None and first.stat().st_dev == (mirror / first.relative_to(directory)).stat().st_dev:
        log.warning("--mirror %s is on the same file system as %s: nothing is gained", mirror, directory)
    return Mirror(directory, mirror, copies)


def _check_copy(path: Path, copy: Path) -> FileStamp:
    try:
        with open(path, "rb", 0) as ours, open(copy, "rb", 0) as theirs:
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
            _compare(path, copy, ours, theirs, 0, min(header, sizes[0]))
            for start, nbytes in _samples(path, sizes[0]):
                _compare(path, copy, ours, theirs, start, nbytes)
            return stamp
    except OSError as error:
        where = error.filename or copy
        raise CheckpointError(f"--mirror: {where}: {error.strerror}; copy the checkpoint there") from error


def _samples(path: Path, size: int) -> Iterable[tuple[int, int]]:
    """Places and lengths: of every tensor its start, its end and one of chance, and the end of the file."""
    for entry in read_header(path):
        last = max(0, entry.nbytes - SAMPLE_BYTES)
        for start in sorted({0, random.randint(0, last), last}):
            yield entry.offset + start, min(SAMPLE_BYTES, entry.nbytes)
    yield max(0, size - SAMPLE_BYTES), SAMPLE_BYTES


def _compare(path: Path, copy: Path, ours: BinaryIO, theirs: BinaryIO, start: int, nbytes: int) -> None:
    ours.seek(start)
    theirs.seek(start)
    if ours.read(nbytes) != theirs.read(nbytes):
        raise CheckpointError(
            f"--mirror: {copy} differs from {path} at byte {start}; it is not the same checkpoint"
        )
