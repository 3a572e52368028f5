"""Which rows go to which expert, and which experts are multiplied together. Pure functions over NumPy arrays.

Called by `models.experts.experts` for a prompt's sweep.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streaming.sweep import Place

Indices = NDArray[np.int64]
# Of experts that are multiplied together each has the rows of the one with most, rounded up to so many.
GROUPED_ROWS = 16


def rows_by_expert(wanted: NDArray[np.int32]) -> dict[int, tuple[Indices, Indices]]:
    """Expert id -> (rows that want it, place of it among the row's experts). wanted [N, k]."""
    order = np.argsort(wanted, axis=None, kind="stable")
    ids, starts = np.unique(wanted.ravel()[order], return_index=True)
    pairs = np.split(order, starts[1:])
    k = wanted.shape[1]
    return {int(e): (p // k, p % k) for e, p in zip(ids, pairs, strict=True)}


def cut_pieces(rows: Indices, columns: Indices, size: int) -> Iterator[tuple[Indices, Indices]]:
    """An expert's rows, and its place among each row's experts, in pieces."""
    for first in range(0, len(rows), size):
        piece = slice(first, first + size)
        yield rows[piece], columns[piece]


def ranks_of(rows_of: Mapping[int, tuple[Indices, Indices]], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """For each (row, expert) pair its place among the rows that want the expert: int32 of this shape."""
    ranks = np.empty(shape, np.int32)
    for rows, columns in rows_of.values():
        ranks[rows, columns] = np.arange(len(rows))
    return ranks


def cut_runs(group: Sequence[Place], can_join: Callable[[Place], bool]) -> Iterator[tuple[list[Place], bool]]:
    """The group in order, as runs of one bank that are multiplied together (True) and places that are not."""
    run: list[Place] = []
    for place in group:
        joins = can_join(place)
        if run and not (joins and place.arrays is run[0].arrays):
            yield run, True
            run = []
        if joins:
            run.append(place)
        else:
            yield [place], False
    if run:
        yield run, True


def lay_out(
    run: Sequence[Place], rows_of: Mapping[int, tuple[Indices, Indices]]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows of each expert of the run, int32 [experts, height], filled up with row 0; and for each expert id
    where its rows begin among them, int32 [largest id + 1], or -1."""
    most = max(len(rows_of[place.expert][0]) for place in run)
    height = -(-most // GROUPED_ROWS) * GROUPED_ROWS
    chosen = np.zeros((len(run), height), np.int32)
    bases = np.full(1 + max(rows_of), -1, np.int32)
    for number, place in enumerate(run):
        rows, _ = rows_of[place.expert]
        chosen[number, : len(rows)] = rows
        bases[place.expert] = number * height
    return chosen, bases
