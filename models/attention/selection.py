"""Choosing the keys that a query attends to, and carrying the choice from a full layer to shared ones.

Called by attention. Ties go to the lower position, so that the choice does not depend on how a prompt was
cut into parts.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

# Of float32, as two halves: as many passes over two bytes a score, not four.
HALF_BITS = 16


def causal_mask(first: int, rows: int, num_keys: int) -> mx.array:
    """Which keys may be seen: bool [rows, num_keys]; row i stands at position first + i."""
    return mx.arange(num_keys)[None, :] <= mx.arange(first, first + rows)[:, None]


def kth_by_partition(scores: mx.array, k: int) -> mx.array:
    """The k-th best score of each row, float32 [N, T] -> [N, 1]: MLX's partition, a sort on some backends."""
    return -mx.partition(-scores, k - 1, axis=-1)[:, k - 1 : k]


def kth_by_numpy(scores: mx.array, k: int) -> mx.array:
    """The same by NumPy's selection, evaluated at once."""
    mx.eval(scores)
    values = np.array(scores, copy=False)
    return mx.array(np.partition(values, values.shape[1] - k, axis=-1)[:, -k, None])


def kth_by_bits(scores: mx.array, k: int) -> mx.array:
    """The same bit by bit: 32 times the scores from some value on are counted, and nothing is sorted."""
    bits = (scores + 0.0).view(mx.uint32)  # of -0.0, which equals 0.0, the same bits
    is_negative = bits >> 31
    ordered = bits ^ mx.where(is_negative == 1, mx.array(2**32 - 1, mx.uint32), mx.array(2**31, mx.uint32))
    high = (ordered >> HALF_BITS).astype(mx.uint16)
    prefix, wanted = _kth_half(high, mx.array(k, mx.int32))
    low = mx.where(high == prefix, ordered.astype(mx.uint16), mx.array(0, mx.uint16))
    rest, _ = _kth_half(low, wanted)
    found = (prefix.astype(mx.uint32) << HALF_BITS) | rest.astype(mx.uint32)
    was_negative = found < 2**31
    return mx.where(was_negative, ~found, found ^ mx.array(2**31, mx.uint32)).view(mx.float32)


def _kth_half(values: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
    """The largest value [N, 1] that at least `wanted` of a row's reach, uint16 [N, T], and how many of those
    that equal it are wanted."""
    found = mx.zeros((values.shape[0], 1), mx.uint16)
    for bit in reversed(range(HALF_BITS)):
        candidate = found | mx.array(1 << bit, mx.uint16)
        count = (values >= candidate).sum(axis=-1, keepdims=True)
        found = mx.where(count >= wanted, candidate, found)
    return found, wanted - (values > found).sum(axis=-1, keepdims=True)


def select(
    scores: mx.array,
    visible: mx.array,
    k: int,
    kth_best: Callable[[mx.array, int], mx.array] = kth_by_partition,
) -> mx.array:
    """The k best visible keys of each row: float32 [N, T], bool [N, T] -> bool [N, T].

    Above the k-th best score all are taken, at it the first ones by position until k are together. A row
    that sees fewer than k keys takes all of them. Every `kth_best` gives the same bits.
    """
    masked = mx.where(visible, scores, -mx.inf)
    threshold = kth_best(masked, k)
    above = masked > threshold
    level = (masked == threshold) & visible
    wanted = k - above.sum(axis=-1, keepdims=True)
    rank = mx.cumsum(level.astype(mx.int32), axis=-1)
    return above | (level & (rank <= wanted))


def selected_positions(selected: mx.array, k: int) -> mx.array:
    """Positions of the selected keys, ascending: bool [N, T] -> int32 [N, k]; T where fewer than k are.

    Each selected position is written to its rank among them; a sort would cost T log T.
    """
    rows, num_keys = selected.shape
    rank = mx.where(selected, mx.cumsum(selected.astype(mx.int32), axis=-1) - 1, k)  # the rest goes to k
    positions = mx.broadcast_to(mx.arange(num_keys, dtype=mx.int32), selected.shape)
    out = mx.full((rows, k + 1), num_keys, dtype=mx.int32)
    return mx.put_along_axis(out, rank, positions, axis=-1)[:, :k]
