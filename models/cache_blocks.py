"""Rows of a sequence's cache as bytes, block by block, and back. Called by the prefix cache; owns nothing.

A block of n tokens is, for each layer in order, its latents [n, latent_dim], then for each full layer its
index keys [n, index_head_dim], in the cache's own dtype and the machine's byte order. Not a bit changes on
the way: rows that are filled in are the rows that were read out. They need not be the bits that computing the
same tokens again would give, because passes over few rows and over many round differently
(models/arithmetic.py).
"""

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

import models
from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.cache import RowCache, SequenceCache
from models.checkpoint_tensors import read_tensors
from streaming.floats import Bytes


def read_blocks(cache: SequenceCache, start: int, sizes: Sequence[int]) -> list[Bytes]:
    """The blocks of so many tokens each that begin at row `start`, as bytes of their own."""
    stop = start + sum(sizes)
    assert stop <= cache.length, "only rows that every layer has are read"
    rows = [part.rows(start, stop).view(mx.uint8) for part in _parts(cache)]
    mx.eval(rows)
    views = [np.array(array, copy=False) for array in rows]
    blocks, first = [], 0
    for size in sizes:
        blocks.append(np.concatenate([view[first : first + size].reshape(-1) for view in views]))
        first += size
    return blocks


def fill_blocks(cache: SequenceCache, blocks: Sequence[Bytes], sizes: Sequence[int]) -> None:
    """Append the rows of these blocks to every layer. All or nothing: an error leaves the cache as it was."""
    if not blocks:
        return
    length = cache.length
    try:
        _append(cache, blocks, sizes)
        mx.eval([part.state for part in _parts(cache)])
    except Exception:
        cache.trim(length)
        raise


def _append(cache: SequenceCache, blocks: Sequence[Bytes], sizes: Sequence[int]) -> None:
    offset = 0
    for part in _parts(cache):
        dtype, width = _row_shape(part)
        pieces = [
            block[size * offset : size * (offset + width)].reshape(size, width)
            for block, size in zip(blocks, sizes, strict=True)
        ]
        part.append(mx.array(np.concatenate(pieces)).view(dtype))
        offset += width
    assert all(block.size == size * offset for block, size in zip(blocks, sizes, strict=True)), (
        "a block holds the rows of every layer"
    )


def bytes_per_token(cache: SequenceCache) -> int:
    """Bytes that a token takes in a block."""
    return sum(_row_shape(part)[1] for part in _parts(cache))


def cache_fingerprint(
    directory: Path, args: ModelArgs, arithmetic: Arithmetic, *, knows_times: bool = True
) -> bytes:
    """32 bytes that differ where saved rows must not be used: another checkpoint, another computation.

    The checkpoint is known by its config and by the size, time and header of its files, with 16 samples of
    each: reading 300 GB to be surer would take longer than the prefix cache can save. The computation is
    known by its arithmetic, by MLX's version, and by the sources of this folder, so that no change of the
    attention's form can be forgotten. Without the files' times it is the same on all machines that have this
    checkpoint.
    """
    digest = hashlib.sha256(f"{args!r} {arithmetic!r} mlx {version('mlx')}".encode())
    for source in sorted(Path(models.__file__).parent.glob("*.py")):
        _feed(digest, source.name.encode(), source.read_bytes())
    _feed(digest, (directory / "config.json").read_bytes())
    for path in sorted({entry.path for entry in read_tensors(directory, args).values()}):
        stat = path.stat()
        time = f" {stat.st_mtime_ns}" if knows_times else ""
        _feed(digest, f"{path.name} {stat.st_size}{time}".encode(), *_samples(path))
    return digest.digest()


def _samples(path: Path, count: int = 16, nbytes: int = 4096) -> Iterable[bytes]:
    with open(path, "rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
        yield file.read(header_bytes - 8)
        size = path.stat().st_size
        for sample in range(count):
            file.seek(header_bytes + (size - header_bytes) * sample // count)
            yield file.read(nbytes)


def _feed(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)


def _parts(cache: SequenceCache) -> list[RowCache]:
    return [*cache.latents, *cache.index_keys.values()]


def _row_shape(part: RowCache) -> tuple[mx.Dtype, int]:
    """The dtype of a row and its bytes."""
    empty = part.rows(0, 0)
    return empty.dtype, empty.shape[1] * empty.dtype.size
