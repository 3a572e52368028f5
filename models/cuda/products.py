"""Products of few rows with 4-bit weights. Called by `models.arithmetic`."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx

from models.cuda.few_rows_source import ROTATION
from models.cuda.kernel import WARP, Kernel, make_kernel
from models.cuda.product_source import (
    BEGIN,
    DOT,
    GATED,
    GROUPS_AT_ONCE,
    HEADER,
    PLACE,
    ROTATE,
    SEVERAL,
    SILU,
    STORE,
)

# Rows that one block multiplies with the weights it has read; a tensor core's tile has so many columns.
TILE_ROWS = 8
# Outputs of one block: the rows of a tensor core's tile.
TILE_OUTPUTS = 16
MOST_WARPS = 8

Parts = Sequence[mx.array]  # weight [..., N, words], scales and, if affine, biases


class PackedWeight(Protocol):
    """A packed matrix, or one for each head or expert."""

    @property
    def weight(self) -> mx.array: ...

    def get(self, name: str, /) -> mx.array | None: ...


def parts_of(w: PackedWeight) -> list[mx.array]:
    """Weight, scales and, where there are any, biases."""
    return [w.weight, *(part for name in ("scales", "biases") if (part := w.get(name)) is not None)]


@cache
def _product_kernel(
    is_affine: bool, group_size: int, place: str, is_gated: bool, adds: bool, rotated: int, limit: float
) -> Kernel:
    """x with packed weights; gated: silu(x gate) * (x up), within a limit."""
    names, source = ["x"], PLACE[place] + (ROTATE if rotated else "") + BEGIN
    for which, name in enumerate("wv" if is_gated else "w"):
        names += [name, f"{name}s"] + ([f"{name}b"] if is_affine else [])
        dot = DOT.replace("WEIGHT", name).replace("SCALES", f"{name}s").replace("WHICH", str(which))
        source += dot.replace("BIASES", f"{name}b" if is_affine else f"{name}s")
    value = GATED if is_gated else "result[0][i]"
    if adds:
        value += " + static_cast<float>(added[to + i / 16 * to_step + blockIdx.x * 16L + i % 16])"
    source = _filled(source + STORE.replace("VALUE", value), is_affine, group_size)
    extra = {"slots": place == "slots", "periods": rotated, "positions": rotated, "added": adds}
    kind = "gated" if is_gated else "added" if adds else "product"
    bound = "NO_LIMIT" if limit == math.inf else f"static_cast<float>({limit!r})"
    return make_kernel(
        f"{kind}_{place}_{_format(is_affine, group_size)}_{rotated}",
        input_names=[*names, *(name for name, is_there in extra.items() if is_there)],
        output_names=["out"],
        source=source.replace("ROTATED", str(rotated)).replace("-LIMIT", f"-{bound}"),
        header=HEADER + (SILU.replace("BOUND", bound) if is_gated else "") + (ROTATION if rotated else ""),
    )


@cache
def _several_kernel(is_affine: bool, group_size: int, count: int) -> Kernel:
    """x with several packed weights, each with an output of its own."""
    find, stores, names = "", "", ["x"]
    for i in range(count):
        bias = f"b{i}" if is_affine else f"s{i}"
        names += [f"w{i}", f"s{i}"] + ([bias] if is_affine else [])
        find += f"if (tile < w{i}_shape[0] / 16) {{ weight = w{i}; scale = s{i}; bias = {bias}; "
        find += f"N = w{i}_shape[0]; which = {i}; }} else {{ tile -= w{i}_shape[0] / 16; "
        stores += f"if (which == {i}) out{i}[at] = static_cast<T{i}>(result[i]);\n"
    source = SEVERAL.replace("FIND", find + "return; " + "}" * count).replace("STORES", stores)
    return make_kernel(
        f"several{count}_{_format(is_affine, group_size)}",
        input_names=names,
        output_names=[f"out{i}" for i in range(count)],
        source=_filled(
            source.replace("SCALE", "Bf16" if is_affine else "unsigned char"), is_affine, group_size
        ),
        header=HEADER,
    )


def _format(is_affine: bool, group_size: int) -> str:
    return f"{'affine' if is_affine else 'mxfp4'}{group_size}"


def _filled(source: str, is_affine: bool, group_size: int) -> str:
    return source.replace("AFFINE", str(is_affine).lower()).replace("GROUP", str(group_size))


def supports(x: mx.array, weight: mx.array, scales: mx.array, mode: str, bits: int, group_size: int) -> bool:
    """Whether `multiply` takes these: bfloat16 rows and 4-bit weights of even sizes."""
    is_format = (mode == "affine" and scales.dtype == mx.bfloat16) or mode == "mxfp4"
    fits = weight.shape[-1] * 8 % group_size == 0 and weight.shape[-2] % TILE_OUTPUTS == 0
    return bits == 4 and is_format and x.dtype == mx.bfloat16 and fits


def multiply(
    x: mx.array,
    weights: Sequence[Parts],
    group_size: int,
    *,
    slots: mx.array | None = None,
    added: mx.array | None = None,
    limit: float = math.inf,
) -> mx.array:
    """Rows with packed matrices.

    x [rows, K] with one matrix, or [M, rows, K] with M of them -> [..., rows, N]. With slots, any integers
    [rows, k]: x [rows, K], or [rows, k, K], -> [rows, k, N]. Two weights: silu of the product with the first
    times that with the second, the first at most `limit`, the second at most that far from zero. `added`, of
    the output's shape, is added before the one rounding.
    """
    matrix = weights[0][0]
    outputs = matrix.shape[-2]
    inputs = [x, *(part for weight in weights for part in weight)]
    template: list[tuple[str, Any]] = [("T", x.dtype)]
    if slots is not None:
        place, count, shape = "slots", slots.size, (*slots.shape, outputs)
        inputs.append(slots)
        template.append(("pairs_per_row", slots.size * x.shape[-1] // x.size))
    else:
        place, shape = ("one" if matrix.ndim == 2 else "each"), (*x.shape[:-1], outputs)
        count = x.size // (x.shape[-2] * x.shape[-1]) * -(-x.shape[-2] // TILE_ROWS)
    if added is not None:
        inputs.append(added)
    is_affine, is_gated = len(weights[0]) == 3, len(weights) == 2
    kernel = _product_kernel(is_affine, group_size, place, is_gated, added is not None, 0, limit)
    return _launch(kernel, inputs, template, outputs // TILE_OUTPUTS, count, [shape], [x.dtype], group_size)[
        0
    ]


def multiply_heads(
    x: mx.array,
    weight: Parts,
    group_size: int,
    rotation: tuple[int, mx.array, mx.array] | None = None,
) -> mx.array:
    """Each head of a row with its own matrix [heads, N, words]: x [rows, heads, width] -> [rows, heads, N].

    A matrix takes the first values of its head. With a rotation, how many dimensions follow them, the
    periods of their pairs and the positions int32 [rows]: those stand rotated behind the N outputs.
    """
    heads, outputs = weight[0].shape[:2]
    rotated, *arrays = rotation or (0,)
    kernel = _product_kernel(len(weight) == 3, group_size, "heads", False, False, rotated, math.inf)
    count = heads * -(-x.shape[0] // TILE_ROWS)
    shape = (x.shape[0], heads, outputs + rotated)
    tiles = outputs // TILE_OUTPUTS + bool(rotated)
    return _launch(
        kernel, [x, *weight, *arrays], [("T", x.dtype)], tiles, count, [shape], [x.dtype], group_size
    )[0]


def multiply_each(
    x: mx.array, weights: Sequence[Parts], group_size: int, dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """The same rows [rows, K] with several matrices [N, words]: an output [rows, N] for each, of its type."""
    tiles = sum(weight[0].shape[0] // TILE_OUTPUTS for weight in weights)
    return _launch(
        _several_kernel(len(weights[0]) == 3, group_size, len(weights)),
        [x, *(part for weight in weights for part in weight)],
        [(f"T{i}", dtype) for i, dtype in enumerate(dtypes)],
        tiles,
        -(-x.shape[0] // TILE_ROWS),
        [(x.shape[0], weight[0].shape[0]) for weight in weights],
        dtypes,
        group_size,
    )


def _launch(
    kernel: Kernel,
    inputs: list[mx.array],
    template: list[tuple[str, Any]],
    tiles: int,
    count: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
    group_size: int,
) -> list[mx.array]:
    groups = inputs[1].shape[-1] * 8 // group_size
    warps = min(MOST_WARPS, max(1, groups // GROUPS_AT_ONCE))
    return kernel(
        inputs=inputs,
        template=template,
        grid=(tiles * WARP * warps, count, 1),
        threadgroup=(WARP * warps, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
