"""Tiles: a prompt's rows cut so that no intermediate is large, with the keys that each tile attends to.

Called by attention. Results do not depend on how rows are cut: each row's scores and selection are its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from models.indexer import index_scores
from models.selection import causal_mask, select, selected_positions

# Elements of the largest intermediate of a tile (64 MiB in float32), and its rows: keys behind the last row
# of a tile are never touched, so small tiles save up to half of a long prompt's work.
TILE_ELEMENTS = 2**24
TILE_ROWS = 256
# More rows than a decode batch of agents: evaluated piece by piece.
EAGER_ROWS = 32
# Rows of one span up to which the selected latents are always gathered, so that a sequence's next tokens
# are computed in one form whatever the length.
GATHER_ROWS = 8


@dataclass(frozen=True)
class Tile:
    """Rows start to stop of a span and the keys they attend to, among the first `num_keys`.

    `keys` is a mask bool [rows, num_keys], or positions int32 [rows, k] with `num_keys` standing for
    nothing, or None where all keys are attended to.
    """

    start: int
    stop: int
    num_keys: int
    keys: mx.array | None


def cut_tiles(rows: int, num_keys: int, heads: int) -> Iterator[tuple[int, int, int]]:
    """Cut the last `rows` of num_keys into tiles: start, stop, and the number of keys up to the last row."""
    height = max(1, min(TILE_ROWS, TILE_ELEMENTS // (heads * num_keys)))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        yield start, stop, num_keys - rows + stop


def causal_tiles(rows: int, num_keys: int, heads: int) -> Iterator[Tile]:
    """Tiles in which each row sees every key up to itself."""
    for start, stop, seen in cut_tiles(rows, num_keys, heads):
        height = stop - start
        yield Tile(start, stop, seen, None if height == 1 else causal_mask(seen - height, height, seen))


def select_tiles(
    queries: mx.array, weights: mx.array, keys: mx.array, k: int, gather_from: int
) -> list[Tile]:
    """Select k keys for each row; the rows are the last ones of the keys.

    queries [n, heads, D], weights [n, heads], keys [T, D]. Masks, or positions where so few rows are asked
    for, or so many keys seen, that gathering is cheaper: `gather_from` keys for each selected one. Either
    form takes at most `gather_from` k bytes a row, or 4 k.
    """
    rows, heads, _ = queries.shape
    tiles = []
    for start, stop, seen in cut_tiles(rows, keys.shape[0], heads):
        chosen = causal_mask(seen - (stop - start), stop - start, seen)
        if seen > k:
            scores = index_scores(queries[start:stop], weights[start:stop], keys[:seen])
            chosen = select(scores, chosen, k)
        if rows <= GATHER_ROWS or seen > gather_from * k:
            chosen = selected_positions(chosen, k)
        if rows > EAGER_ROWS:
            mx.eval(chosen)
        tiles.append(Tile(start, stop, seen, chosen))
    return tiles
