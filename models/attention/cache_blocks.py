"""Rows of a sequence's cache as bytes, block by block, and back. Called by the prefix cache; owns nothing.

A block of n tokens is, for each layer in order, its latents [n, latent_dim], then for each full layer its
index keys [n, index_head_dim], in the cache's own dtype and the machine's byte order; of a kind whose rows
stand for several tokens each, those that are full. A block begins at a multiple of every such number. Not a
bit changes on the way: rows that are filled in are the rows that were read out. They need not be the bits
that computing the same tokens again would give, because passes over few rows and over many round differently
(models/arithmetic.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from streaming.files.floats import Bytes

if TYPE_CHECKING:
    from models.attention.cache import RowCache, SequenceCache


def read_blocks(cache: "SequenceCache", start: int, sizes: Sequence[int]) -> list[Bytes]:
    """The blocks of so many tokens each that begin at row `start`, as bytes of their own."""
    stop = start + sum(sizes)
    assert stop <= cache.length, "only rows that every layer has are read"
    strides = [part.stride for part in cache.parts]
    rows = [part.rows(start // part.stride, stop // part.stride).view(mx.uint8) for part in cache.parts]
    mx.eval(rows)
    views = [np.array(array, copy=False) for array in rows]
    blocks, first = [], 0
    for size in sizes:
        cuts = [slice(first // stride, (first + size) // stride) for stride in strides]
        blocks.append(np.concatenate([view[cut].reshape(-1) for view, cut in zip(views, cuts, strict=True)]))
        first += size
    return blocks


def fill_blocks(cache: "SequenceCache", blocks: Sequence[Bytes], sizes: Sequence[int]) -> None:
    """Append the rows of these blocks to every layer. All or nothing: an error leaves the cache as it was."""
    if not blocks:
        return
    length = cache.length
    try:
        _append(cache, blocks, sizes)
        mx.eval([part.state for part in cache.parts])
    except Exception:
        cache.trim(length)
        raise


def _append(cache: "SequenceCache", blocks: Sequence[Bytes], sizes: Sequence[int]) -> None:
    offsets = [0] * len(blocks)
    for part in cache.parts:
        dtype, width = _row_shape(part)
        pieces = []
        for i, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
            rows = size // part.stride
            pieces.append(block[offsets[i] : offsets[i] + rows * width].reshape(rows, width))
            offsets[i] += rows * width
        part.append(mx.array(np.concatenate(pieces)).view(dtype))
    assert [block.size for block in blocks] == offsets, "a block holds the rows of every layer"


def bytes_per_token(cache: "SequenceCache") -> int:
    """Bytes that a token takes in a whole block."""
    return sum(-(-_row_shape(part)[1] // part.stride) for part in cache.parts)


def _row_shape(part: "RowCache") -> tuple[mx.Dtype, int]:
    """The dtype of a row and its bytes."""
    empty = part.rows(0, 0)
    return empty.dtype, empty.shape[1] * empty.dtype.size
