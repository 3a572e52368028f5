"""Attention of few rows in few kernels. Called by `models.arithmetic`.

Arrays of a cache are taken whole: how many of their rows count follows from the positions, so that a step's
kernels stay the same while a sequence grows.
"""

from functools import cache

import mlx.core as mx

from models.cuda.few_rows_source import (
    ALL,
    ATTENDED,
    CHOSEN,
    FRAGMENTS,
    JOINED,
    NONE,
    NORMED,
    NORMED_KEYS,
    REDUCTION,
    ROTATION,
    SCORES,
)
from models.cuda.kernel import Kernel, make_kernel

SCORED_KEYS, ATTENDED_KEYS, ATTENDED_HEADS, MOST_SPLITS = 32, 64, 16, 1024


@cache
def _normed_kernel(rotated: int) -> Kernel:
    names = ["q", "kv", "q_norm", "kv_norm", "periods", "positions"]
    outputs = ["residual", "rows"]
    if rotated:
        names, outputs = [*names, "k", "k_norm", "k_bias"], [*outputs, "keys"]
    source = NORMED + (NORMED_KEYS if rotated else "")
    source = source.replace("ROTATED", str(rotated))
    return make_kernel(f"normed_{rotated}", names, outputs, source, ROTATION + REDUCTION)


def norm_rows(
    q: mx.array,
    kv: mx.array,
    norms: tuple[mx.array, mx.array],
    rotation: tuple[mx.array, mx.array],
    keys: tuple[mx.array, mx.array, mx.array] | None,
) -> list[mx.array]:
    """What the first products become: query residual normed, cache rows normed and rotated, and index keys.

    q [n, Q], kv [n, L + R]; weights of their norms [Q], [L]; periods [R / 2] and positions int32 [n]; `keys`:
    float32 [n, D], with weight and bias of their norm.
    """
    inputs = [q, kv, *norms, *rotation, *(keys or ())]
    outputs = [q, kv] + ([keys[0]] if keys else [])
    return _normed_kernel(2 * rotation[0].size if keys else 0)(
        inputs=inputs,
        template=[("T", q.dtype)],
        grid=(256 * len(outputs), q.shape[0], 1),
        threadgroup=(256, 1, 1),
        output_shapes=[array.shape for array in outputs],
        output_dtypes=[q.dtype] * len(outputs),
    )


@cache
def _scores_kernel(scale: float) -> Kernel:
    names = ["queries", "weights", "keys", "periods", "positions"]
    source = SCORES.replace("SCALE", f"{scale!r}f")
    return make_kernel("index_scores", names, ["out"], source, ROTATION)


def can_score(heads: int, width: int) -> bool:
    """Whether `index_scores` takes them: its queries fit in a block's memory."""
    return heads % 4 == 0 and width % 8 == 0 and heads * width <= 4096 and width <= 128


def index_scores(
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    rotation: tuple[mx.array, mx.array],
) -> mx.array:
    """Scores of a sequence's last rows with all index keys up to each: float32 [n, T], beyond that anything.

    queries float32 [n, heads * D], not rotated yet; weights float32 [n, heads]; keys bfloat16 [T, D]; periods
    and positions int32 [n].
    """
    rows, heads = weights.shape
    num_keys, width = keys.shape
    return _scores_kernel(float(heads**-0.5 * width**-0.5))(
        inputs=[queries, weights, keys, *rotation],
        template=[("HEADS", heads), ("D", width), ("ROTATED", 2 * rotation[0].size)],
        grid=(-(-num_keys // SCORED_KEYS) * 128, rows, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(rows, num_keys)],
        output_dtypes=[mx.float32],
    )[0]


@cache
def _attended_kernel(latent: int, is_chosen: bool, scale: float) -> Kernel:
    source = ATTENDED.replace("PLACE", CHOSEN if is_chosen else ALL).replace("SCALE", f"{scale!r}f")
    names = ["q", "keys", "positions", *(["chosen"] if is_chosen else [])]
    shared = ATTENDED_KEYS * (latent + 8) * 2
    kind = "chosen" if is_chosen else "all"
    outputs, header = ["pieces", "parts"], NONE + FRAGMENTS
    return make_kernel(f"attended_{kind}_{latent}", names, outputs, source, header, shared)


@cache
def _joined_kernel() -> Kernel:
    return make_kernel("joined", ["pieces", "parts"], ["out"], JOINED, NONE)


def can_attend(latent: int, values: int, most: int) -> bool:
    """Whether `attend` takes latents so wide, of which so many are values, and so many keys."""
    return latent % 32 == 0 and values % 128 == 0 and latent <= 1024 and most <= MOST_SPLITS * ATTENDED_KEYS


def attend(
    q: mx.array,
    keys: mx.array,
    positions: mx.array,
    chosen: mx.array | None,
    most: int,
    values: int,
    scale: float,
) -> mx.array:
    """softmax(scale q keys^T) times the keys' first `values`, of one sequence: [n, heads, values].

    q [n, heads, latent], keys [T, latent], positions int32 [n]; chosen int32 [n, k], of which those beyond
    a row's position stand for nothing, or None: all up to there, which are at most `most`.
    """
    rows, heads, latent = q.shape
    most = min(most, keys.shape[0]) if chosen is None else chosen.shape[1]
    splits = -(-most // ATTENDED_KEYS)
    pieces, parts = _attended_kernel(latent, chosen is not None, scale)(
        inputs=[q, keys, positions, *([] if chosen is None else [chosen])],
        template=[("LATENT", latent), ("VALUES", values)],
        grid=(splits * 256, -(-heads // ATTENDED_HEADS), rows),
        threadgroup=(256, 1, 1),
        output_shapes=[(rows, splits, heads, values), (rows, splits, heads, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return _joined_kernel()(
        inputs=[pieces, parts],
        template=[("T", q.dtype)],
        grid=(heads * 128, rows, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(rows, heads, values)],
        output_dtypes=[q.dtype],
    )[0]
