"""Choosing the pools of keys that a row attends to. Called by pooled attention.

Ties go to the earlier pool, so that the choice does not depend on how a prompt was cut into parts.
"""

import mlx.core as mx

from models.arithmetic import Arithmetic
from models.attention.indexer import index_scores
from models.attention.selection import causal_mask, select, selected_positions
from models.attention.tiles import GATHER_ROWS, Tile, cut_tiles, tile_rows
from models.glm5_next.flash_args import FlashArgs
from models.in_flight import InFlight


def select_pools(
    queries: mx.array,
    weights: mx.array,
    pools: mx.array,
    num_keys: int,
    args: FlashArgs,
    *,
    arithmetic: Arithmetic,
    in_flight: InFlight | None = None,
) -> list[Tile]:
    """What each row attends to; the rows are the last ones of `num_keys` tokens.

    queries [n, index heads, D], weights [n, index heads], pools [P, D]: full pools. Masks or positions, as
    in `models.attention.tiles.select_tiles`. `in_flight`: each tile is a piece of it; else all stay lazy.
    """
    rows, limit = queries.shape[0], arithmetic.tile_elements
    most = arithmetic.gather_from * args.index_topk
    height = tile_rows(max(args.num_attention_heads * min(num_keys, most), num_keys), limit)
    tiles = []
    for start, stop, seen in cut_tiles(rows, num_keys, height):
        gathers = rows <= GATHER_ROWS or seen > most
        positions = mx.arange(seen - (stop - start), seen, dtype=mx.int32)
        num_pools = seen // args.index_kpool
        chosen: mx.array | None = None
        if num_pools > args.topk_pools:
            scores = index_scores(
                queries[start:stop], weights[start:stop], pools[:num_pools], arithmetic, in_flight
            )
            best = arithmetic.best_positions(scores, args.topk_pools) if stop - start == 1 else None
            if best is not None:  # a single row sees every full pool
                tiles.append(Tile(start, stop, seen, _spread(best, num_pools, positions, seen, args)))
                continue
            chosen = _chosen(scores, positions, args, arithmetic)
        if chosen is None:
            keys = None if stop - start == 1 else causal_mask(seen - (stop - start), stop - start, seen)
        else:
            keys = (_positions if gathers else _mask)(chosen, positions, seen, args)
        if in_flight and keys is not None:
            in_flight.launch(keys)
        tiles.append(Tile(start, stop, seen, keys))
    return tiles


def _chosen(scores: mx.array, positions: mx.array, args: FlashArgs, arithmetic: Arithmetic) -> mx.array:
    """The best of the pools that end at or before each row: float32 [n, P], int32 [n] -> bool [n, P]."""
    ends = (mx.arange(scores.shape[1]) + 1) * args.index_kpool
    visible = ends[None, :] <= positions[:, None] + 1
    return select(scores, visible, args.topk_pools, arithmetic.kth_best)


def _mask(chosen: mx.array, positions: mx.array, num_keys: int, args: FlashArgs) -> mx.array:
    """Which keys are seen, bool [n, num_keys]: those of chosen pools [n, P], and the row's own tail."""
    keys = mx.arange(num_keys)
    own = positions[:, None]
    is_tail = (keys >= (own + 1) // args.index_kpool * args.index_kpool) & (keys <= own)
    spread = mx.repeat(chosen, args.index_kpool, axis=1)
    rest = num_keys - spread.shape[1]
    return mx.pad(spread, [(0, 0), (0, rest)]) | is_tail


def _positions(chosen: mx.array, positions: mx.array, num_keys: int, args: FlashArgs) -> mx.array:
    """The same as positions, int32 [n, index_topk + pool - 1], ascending; `num_keys` stands for nothing."""
    pools = selected_positions(chosen, args.topk_pools)
    return _spread(pools, chosen.shape[1], positions, num_keys, args)


def _spread(best: mx.array, num_pools: int, positions: mx.array, num_keys: int, args: FlashArgs) -> mx.array:
    """Positions of the keys in chosen pools [n, index_topk / pool] and in the row's own tail."""
    size, pools = args.index_kpool, best[..., None]
    spread = mx.where(pools < num_pools, pools * size + mx.arange(size, dtype=mx.int32), num_keys)
    own = positions[:, None]
    tail = (own + 1) // size * size + mx.arange(size - 1, dtype=mx.int32)
    tail = mx.where(tail <= own, tail, num_keys)
    return mx.concatenate([spread.reshape(best.shape[0], -1), tail], axis=-1).astype(mx.int32)
