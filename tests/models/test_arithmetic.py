"""What NumPy computes on the CPU is what MLX computes, many times faster; few rows of weights stay MLX's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arithmetic import CPU, MAX_UNPACKED_BYTES, Arithmetic, Dense, Quantization, Weight
from models.attention.selection import causal_mask
from models.workspace import FLOAT4_COPIES, UNPACKED_COPIES

MLX = replace(CPU, uses_numpy=False)
ROWS = 40


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * scale


@dataclass(frozen=True)
class Packed:
    """A weight as a checkpoint packs it."""

    parts: dict[str, mx.array]
    quantization: Quantization

    @property
    def weight(self) -> mx.array:
        return self.parts["weight"]

    def get(self, name: str, /) -> mx.array | None:
        return self.parts.get(name)


def packed(*shape: int, bits: int = 4, mode: str = "affine") -> Packed:
    q = Quantization(32, bits, mode)
    parts = mx.quantize(normal(*shape), q.group_size, q.bits, q.mode)
    return Packed(dict(zip(("weight", "scales", "biases"), parts, strict=False)), q)


WEIGHTS: dict[str, Weight] = {
    "dense": Dense(normal(48, 64)),
    "bfloat16": Dense(normal(48, 64).astype(mx.bfloat16)),
    "a slice of a bank": Dense(normal(3, 48, 64)[1]),
    "affine, 3 bits": packed(48, 64, bits=3),
    "affine, 8 bits": packed(48, 64, bits=8),
    "mxfp4": packed(48, 64, mode="mxfp4"),
}
PER_HEAD: dict[str, Weight] = {"dense": Dense(normal(5, 48, 64)), "packed": packed(5, 48, 64)}
INPUTS = {
    "rows": normal(ROWS, 64),
    "every second row": normal(2 * ROWS, 64)[::2],
    "a slice of wider rows": normal(ROWS, 100)[:, 10:74],
    "bfloat16": normal(ROWS, 64).astype(mx.bfloat16),
    "batched": normal(2, ROWS, 64),
}


def close(found: mx.array, expected: mx.array, within: float = 1e-4) -> bool:
    assert found.dtype == mx.float32
    assert found.shape == expected.shape
    return bool(mx.abs(found - expected).max() < within)


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_many_rows_times_one_matrix(x: str, weight: str) -> None:
    expected = MLX.product(INPUTS[x].astype(mx.float32), WEIGHTS[weight])
    assert close(CPU.product(INPUTS[x], WEIGHTS[weight]), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "mode", "num_outputs"),
    [(2, "affine", 2**20 + 2**19), (8, "affine", 2**20 + 2**19 + 37), (4, "mxfp4", 2**20 + 2**19 - 5)],
)
def test_a_matrix_of_many_outputs_is_unpacked_by_parts(bits: int, mode: str, num_outputs: int) -> None:
    """A head is as large unpacked as all else of a step: 0.8 GB here."""
    w, x = packed(64, 128, bits=bits, mode=mode), normal(ROWS // 4, 128)
    tiled = {
        name: mx.contiguous(mx.tile(part, (num_outputs // 64 + 1, 1))[:num_outputs])
        for name, part in w.parts.items()
    }
    mx.eval(tiled)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    found = CPU.product(x, Packed(tiled, w.quantization))
    mx.eval(found)
    copies = FLOAT4_COPIES if mode == "mxfp4" else UNPACKED_COPIES[bits]
    assert mx.get_peak_memory() - held - found.nbytes < copies * MAX_UNPACKED_BYTES + 2**20
    assert close(found[:, -64:], mx.roll(CPU.product(x, w), -(num_outputs % 64), 1)[:, -64:])
    assert close(found[:, :64], CPU.product(x, w))


@pytest.mark.parametrize("weight", PER_HEAD)
def test_many_rows_times_a_matrix_for_each_head(weight: str) -> None:
    of_rows = normal(ROWS, 5, 80)[..., :64].transpose(1, 0, 2)  # as attention has them
    assert close(CPU.product(of_rows, PER_HEAD[weight]), MLX.product(of_rows, PER_HEAD[weight]))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_few_rows_keep_the_bits_that_each_has_alone(rows: int, weight: str) -> None:
    x, w = normal(rows, 64), WEIGHTS[weight]
    alone = mx.concatenate([MLX.product(x[i : i + 1], w) for i in range(rows)])
    assert mx.array_equal(CPU.product(x, w), alone)


def test_a_product_leaves_its_inputs_as_they_are() -> None:
    x, w = normal(ROWS, 64), WEIGHTS["dense"]
    before = np.array(x), np.array(w.weight)
    CPU.mlp(x, w, w, Dense(normal(64, 48)))
    CPU.attended(x[None], x, x, causal_mask(0, ROWS, ROWS))
    assert np.array_equal(np.array(x), before[0])
    assert np.array_equal(np.array(w.weight), before[1])


@pytest.mark.parametrize("rows", [1, 3, 8, ROWS])
@pytest.mark.parametrize("hides", [False, True])
def test_attention_to_all_keys(rows: int, hides: bool) -> None:
    q, keys = normal(5, rows, 24), normal(700, 24, seed=1)
    visible = causal_mask(700 - rows, rows, 700) if hides else None
    found = CPU.attended(q, keys, keys[:, :16], visible)
    assert close(found, MLX.attended(q, keys, keys[:, :16], visible), 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, ROWS])
def test_attention_to_keys_that_each_row_chose(rows: int) -> None:
    q, keys = normal(rows, 5, 24), normal(rows, 600, 24, seed=1)
    visible = mx.arange(600)[None, None] < mx.arange(1, rows + 1)[:, None, None]
    found = CPU.attended(q, keys, keys, visible)
    assert close(found, MLX.attended(q, keys, keys, visible), 1e-5)


def test_large_scores_are_no_overflow() -> None:
    q, keys = normal(2, ROWS, 24, scale=1e4), normal(ROWS, 24, seed=1)
    found = CPU.attended(q, keys, keys, causal_mask(0, ROWS, ROWS))
    assert close(found, MLX.attended(q, keys, keys, causal_mask(0, ROWS, ROWS)), 1e-2)
    assert not mx.isnan(found).any()


@pytest.mark.parametrize("rows", [1, 8, ROWS])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_index_scores(rows: int, dtype: mx.Dtype) -> None:
    queries, weights = normal(rows, 4, 16), normal(rows, 4, seed=1)
    keys = normal(1100, 16, seed=2).astype(dtype)
    assert close(CPU.index_scores(queries, weights, keys), MLX.index_scores(queries, weights, keys), 1e-5)


def test_an_mlp_whose_gates_are_large_is_no_overflow() -> None:
    x = normal(ROWS, 64, scale=100)  # gates from -4,000 to 4,000
    gate, up, down = WEIGHTS["dense"], WEIGHTS["affine, 8 bits"], Dense(normal(64, 48, seed=2))
    expected = MLX.mlp(x, gate, up, down)
    largest = float(mx.abs(expected).max())
    assert close(CPU.mlp(x, gate, up, down) / largest, expected / largest, 1e-6)


@pytest.mark.parametrize("arithmetic", [CPU, MLX])
def test_rows_are_added_where_they_belong(arithmetic: Arithmetic) -> None:
    added, rows = normal(3, 9), np.array([1, 4, 39])
    out = np.array(arithmetic.add_rows(mx.ones((ROWS, 9)), rows, added))
    assert np.array_equal(out[rows], 1 + np.array(added))
    assert out.sum() == pytest.approx(ROWS * 9 + float(added.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "products"), [("product", 1), ("mlp", 2), ("attended", 2), ("index_scores", 2)]
)
def test_many_rows_are_not_left_to_the_blas_of_the_wheel(
    name: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's wheel has the reference BLAS, up to 50 times slower than NumPy's. `@` is not counted."""
    x, w = normal(16, 128), Dense(normal(128, 128))
    of_heads, keys = normal(2, 16, 128), normal(64, 128)
    queries, weights = normal(16, 2, 128), normal(16, 2)
    calls: dict[str, Callable[[Arithmetic], mx.array]] = {
        "product": lambda arithmetic: arithmetic.product(x, w),
        "mlp": lambda arithmetic: arithmetic.mlp(x, w, w, w),
        "attended": lambda arithmetic: arithmetic.attended(of_heads, keys, keys, None),
        "index_scores": lambda arithmetic: arithmetic.index_scores(queries, weights, keys),
    }
    seen, matmul = [], np.matmul

    def counted(*given: Any, **options: Any) -> Any:
        seen.append(given)
        return matmul(*given, **options)

    monkeypatch.setattr(np, "matmul", counted)
    mx.eval(calls[name](MLX))
    assert not seen
    mx.eval(calls[name](CPU))
    assert len(seen) == products
