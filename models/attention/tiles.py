"""Tiles: a prompt's rows cut so that no intermediate is large, with the keys that each tile attends to.

Called by attention. Results do not depend on how rows are cut: each row's scores and selection are its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from models.arithmetic import Arithmetic
from models.attention.indexer import index_scores
from models.attention.selection import causal_mask, select, selected_positions
from models.in_flight import InFlight

# Rows of a tile. At most: keys behind its last row are never touched, so small tiles save up to half of a
# long prompt's work. At least: fewer rows are a poor product.
TILE_ROWS = 256
MIN_TILE_ROWS = 16
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


def tile_rows(row_elements: int, tile_elements: int) -> int:
    """Rows of a tile whose intermediate has so many elements for each."""
    return max(MIN_TILE_ROWS, min(TILE_ROWS, tile_elements // row_elements))


def gathered_rows(row_elements: int, tile_elements: int) -> int:
    """Rows of a piece that gathers so many elements for each."""
    return max(1, tile_elements // row_elements)


def cut_tiles(rows: int, num_keys: int, height: int) -> Iterator[tuple[int, int, int]]:
    """Cut the last `rows` of num_keys into tiles: start, stop, and the number of keys up to the last row."""
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        yield start, stop, num_keys - rows + stop


def causal_tiles(rows: int, num_keys: int, height: int) -> Iterator[Tile]:
    """Tiles in which each row sees every key up to itself."""
    for start, stop, seen in cut_tiles(rows, num_keys, height):
        n = stop - start
        yield Tile(start, stop, seen, None if n == 1 else causal_mask(seen - n, n, seen))


def select_tiles(
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    k: int,
    *,
    heads: int,
    arithmetic: Arithmetic,
    in_flight: InFlight | None = None,
) -> list[Tile]:
    """Select k keys for each row; the rows are the last ones of the keys.

    queries [n, index heads, D], weights [n, index heads], keys [T, D]; `heads` attend to what is selected.
    Masks, or positions where so few rows are asked for, or so many keys seen, that gathering is cheaper:
    `gather_from` keys for each selected one. Either form takes at most `gather_from` k bytes a row, or 4 k.
    `in_flight`: each tile is a piece of it; else all stay lazy.
    """
    rows, limit, most = queries.shape[0], arithmetic.tile_elements, arithmetic.gather_from * k
    height = tile_rows(max(heads * min(keys.shape[0], most), keys.shape[0]), limit)
    tiles = []
    for start, stop, seen in cut_tiles(rows, keys.shape[0], height):
        gathers = rows <= GATHER_ROWS or seen > most
        scores = None
        if seen > k:
            q, w = queries[start:stop], weights[start:stop]
            scores = index_scores(q, w, keys[:seen], arithmetic, in_flight)
        chosen = arithmetic.best_positions(scores, k) if gathers and scores is not None else None
        if chosen is None:
            chosen = None if scores is None or gathers else arithmetic.best_mask(scores, k)
        if chosen is None:
            chosen = causal_mask(seen - (stop - start), stop - start, seen)
            chosen = chosen if scores is None else select(scores, chosen, k, arithmetic.kth_best)
            chosen = selected_positions(chosen, k) if gathers else chosen
        if in_flight:
            in_flight.launch(chosen)
        tiles.append(Tile(start, stop, seen, chosen))
    return tiles
