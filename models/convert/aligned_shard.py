"""A safetensors file of tensors copied from others, in a given order, from a page boundary on.

Called by `align`. The format allows no holes between tensors, so the header is padded with spaces and the
order does the rest. Copying takes `CHUNK_BYTES` of memory, whatever the size of the file.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from config.errors import CheckpointError
from models.convert.shards import layout, write_fully
from streaming.disk.disk import forget_pages

CHUNK_BYTES = 16 * 2**20
PARTIAL = ".partial"


class Copy(NamedTuple):
    """A tensor to be: its name and description, and the bytes of another file that make it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def write_shard(
    path: Path, copies: Sequence[Copy], metadata: Mapping[str, str], on_copied: Callable[[int], None]
) -> None:
    """Writes the file under another name, reads it back, and gives it its name once every tensor is right.

    A file with that name is whole and on the disk. CheckpointError names a tensor that does not come back.
    """
    partial = path.with_name(path.name + PARTIAL)
    header, starts = layout({copy.name: (copy.dtype, copy.shape, copy.nbytes) for copy in copies}, metadata)
    with _opened(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as target:
        write_fully(target, header, 0)
        for copy in copies:
            for done, chunk in _chunks(copy):
                write_fully(target, chunk, starts[copy.name] + done)
                on_copied(len(chunk))
        _sync(target)
    _verify(partial, copies, starts)
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(directory: Path) -> None:
    """Makes renamed and removed names in a folder last through a power cut."""
    with _opened(directory, os.O_RDONLY) as fd:
        os.fsync(fd)


def replace_file(path: Path, text: str) -> None:
    """Gives a file another content at once: a reader, or a power cut, sees the old one or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    with _opened(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_fully(fd, text.encode(), 0)
        _sync(fd)
    partial.replace(path)
    sync_folder(path.parent)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; its format, where it says nothing."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__") or {"format": "mlx"}


def _verify(path: Path, copies: Sequence[Copy], starts: Mapping[str, int]) -> None:
    with _opened(path, os.O_RDONLY) as fd:
        forget_pages(fd)
        for copy in copies:
            for done, chunk in _chunks(copy):
                if os.pread(fd, len(chunk), starts[copy.name] + done) != chunk:
                    raise CheckpointError(
                        f"{path}: {copy.name} was written and does not come back as it was; the disk may be "
                        f"failing, and {copy.path} stays as it is"
                    )


def _chunks(copy: Copy) -> Iterator[tuple[int, bytes]]:
    """The bytes of a tensor, each with how many came before."""
    with _opened(copy.path, os.O_RDONLY) as fd:
        done = 0
        while done < copy.nbytes:
            chunk = os.pread(fd, min(CHUNK_BYTES, copy.nbytes - done), copy.offset + done)
            if not chunk:
                raise CheckpointError(
                    f"{copy.path}: {copy.name} ends early; the file was cut while it was read"
                )
            yield done, chunk
            done += len(chunk)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    """Returns once the file is on the medium; fsync on macOS stops at the drive's own memory (fsync(2))."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)
