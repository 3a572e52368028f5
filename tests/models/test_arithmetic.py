"""What NumPy does for many rows on the CPU is what MLX does for few."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from models.arithmetic import CPU, Arithmetic
from models.attention.selection import causal_mask

MLX = replace(CPU, has_slow_exp=False)
ROWS = 40


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0)) * 30


@pytest.mark.parametrize("visible", [None, causal_mask(0, ROWS, 70), causal_mask(3, ROWS, 70)[:, None, :]])
def test_softmax(visible: mx.array | None) -> None:
    shape = (ROWS, 5, 70) if visible is not None and visible.ndim == 3 else (5, ROWS, 70)
    expected = np.array(MLX.softmax(normal(*shape), visible, ROWS))
    assert np.abs(np.array(CPU.softmax(normal(*shape), visible, ROWS)) - expected).max() < 1e-6


def test_a_large_gate_of_either_sign_is_no_overflow() -> None:
    gate, up = normal(ROWS, 9), mx.ones((ROWS, 9))
    gate[0, :2] = mx.array([200.0, -200.0])
    expected = np.array(MLX.gated(gate, up))
    found = np.array(CPU.gated(gate + 0, up))
    assert np.abs(found - expected).max() < 1e-5
    assert found[0, :2].tolist() == [200.0, 0.0]


@pytest.mark.parametrize("arithmetic", [CPU, MLX])
def test_rows_are_added_where_they_belong(arithmetic: Arithmetic) -> None:
    added, rows = normal(3, 9), np.array([1, 4, 39])
    out = np.array(arithmetic.add_rows(mx.ones((ROWS, 9)), rows, added))
    assert np.array_equal(out[rows], 1 + np.array(added))
    assert out.sum() == pytest.approx(ROWS * 9 + float(added.sum()), rel=1e-5)


def test_few_rows_stay_lazy_and_many_are_evaluated_in_place() -> None:
    scores = normal(2, ROWS, 9)
    assert CPU.softmax(scores, None, ROWS) is scores
    assert CPU.softmax(scores, None, 1) is not scores
