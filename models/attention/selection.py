"""Choosing the keys that a query attends to, and carrying the choice from a full layer to shared ones.

Called by attention. Ties go to the lower position, so that the choice does not depend on how a prompt was
cut into parts.
"""

import mlx.core as mx


def causal_mask(first: int, rows: int, num_keys: int) -> mx.array:
    """Which keys may be seen: bool [rows, num_keys]; row i stands at position first + i."""
    return mx.arange(num_keys)[None, :] <= mx.arange(first, first + rows)[:, None]


def select(scores: mx.array, visible: mx.array, k: int) -> mx.array:
    """The k best visible keys of each row: float32 [N, T], bool [N, T] -> bool [N, T].

    Above the k-th best score all are taken, at it the first ones by position until k are together. A row
    that sees fewer than k keys takes all of them.
    """
    masked = mx.where(visible, scores, -mx.inf)
    threshold = -mx.partition(-masked, k - 1, axis=-1)[:, k - 1 : k]
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
