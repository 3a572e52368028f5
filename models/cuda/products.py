"""Products of few rows with 4-bit weights. Called by `models.arithmetic`."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from models.cuda.kernel import WARP, Kernel, make_kernel
from models.cuda.product_source import BEGIN, DOT, GATED, GROUPS_AT_ONCE, HEADER, PLACE, SILU, STORE

# Rows that one block multiplies with the weights it has read; a tensor core's tile has so many columns.
TILE_ROWS = 8
# Outputs of one block: the rows of a tensor core's tile.
TILE_OUTPUTS = 16
MOST_WARPS = 8


@cache
def _product_kernel(is_affine: bool, group_size: int, place: str, is_gated: bool) -> Kernel:
    """x with packed weights; gated: silu(x gate) * (x up)."""
    names, source = ["x"], PLACE[place] + BEGIN
    for which, name in enumerate("wv" if is_gated else "w"):
        names += [name, f"{name}s"] + ([f"{name}b"] if is_affine else [])
        dot = DOT.replace("WEIGHT", name).replace("SCALES", f"{name}s").replace("WHICH", str(which))
        source += dot.replace("BIASES", f"{name}b" if is_affine else f"{name}s")
    source += STORE.replace("VALUE", GATED if is_gated else "result[0][i]")
    source = source.replace("AFFINE", str(is_affine).lower()).replace("GROUP", str(group_size))
    return make_kernel(
        f"{'gated' if is_gated else 'product'}_{place}_{'affine' if is_affine else 'mxfp4'}{group_size}",
        input_names=[*names, *(["slots"] if place == "slots" else [])],
        output_names=["out"],
        source=source,
        header=HEADER + SILU,
    )


def supports(x: mx.array, weight: mx.array, scales: mx.array, mode: str, bits: int, group_size: int) -> bool:
    """Whether `multiply` takes these: bfloat16 rows and 4-bit weights of even sizes."""
    is_format = (mode == "affine" and scales.dtype == mx.bfloat16) or mode == "mxfp4"
    fits = x.shape[-1] % group_size == 0 and weight.shape[-2] % TILE_OUTPUTS == 0
    return bits == 4 and is_format and x.dtype == mx.bfloat16 and fits


def multiply(
    x: mx.array,
    weights: Sequence[Sequence[mx.array]],
    group_size: int,
    *,
    slots: mx.array | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> mx.array:
    """Rows with packed matrices, each given as weight [..., N, words], scales and, if affine, biases.

    x [rows, K] with one matrix, or [M, rows, K] with M of them -> [..., rows, N]. With slots, any integers
    [rows, k]: x [rows, K], or [rows, k, K], -> [rows, k, N]. Two weights: silu of the product with the first
    times that with the second.
    """
    matrix = weights[0][0]
    outputs = matrix.shape[-2]
    warps = min(MOST_WARPS, max(1, x.shape[-1] // group_size // GROUPS_AT_ONCE))
    inputs = [x, *(part for weight in weights for part in weight)]
    template: list[tuple[str, Any]] = [("T", dtype)]
    if slots is not None:
        place, count, shape = "slots", slots.size, (*slots.shape, outputs)
        inputs.append(slots)
        template.append(("pairs_per_row", slots.size * x.shape[-1] // x.size))
    else:
        place, shape = ("one" if matrix.ndim == 2 else "each"), (*x.shape[:-1], outputs)
        count = x.size // (x.shape[-2] * x.shape[-1]) * -(-x.shape[-2] // TILE_ROWS)
    return _product_kernel(len(weights[0]) == 3, group_size, place, len(weights) == 2)(
        inputs=inputs,
        template=template,
        grid=(outputs // TILE_OUTPUTS * WARP * warps, count, 1),
        threadgroup=(WARP * warps, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )[0]
