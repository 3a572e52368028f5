"""The indexer against transformers' GlmMoeDsaIndexer, and choosing keys by our own rule for ties."""

import importlib.util
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.arithmetic import CPU, METAL, Arithmetic
from models.attention.indexer import index_scores
from models.attention.selection import (
    causal_mask,
    kth_by_bits,
    kth_by_numpy,
    kth_by_partition,
    select,
    selected_positions,
)
from tests.models.make_golden import SEED, reference_model
from tests.tiny_glm import SHARED, make_weights
from tests.tiny_model import make_model

needs_reference = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed")


@pytest.mark.reference
@needs_reference
def test_keys_queries_and_head_weights_equal_the_reference_module() -> None:
    import torch

    weights = make_weights(SHARED, SEED)
    for name in weights:
        if name.endswith("indexer.wk.weight"):
            weights[name] *= 3e-3  # small keys: the LayerNorm's epsilon (1e-6, not 1e-5) becomes visible
    reference: Any = reference_model(SHARED, weights).model.layers[0].self_attn
    ours = make_model(SHARED, weights).model.layers[0].self_attn
    x = np.random.default_rng(0).standard_normal((40, SHARED["hidden_size"])).astype(np.float32)
    with torch.no_grad():
        k = reference.indexer.k_norm(reference.indexer.wk(torch.from_numpy(x))).numpy()
        w = reference.indexer.weights_proj(torch.from_numpy(x)).numpy() * SHARED["index_n_heads"] ** -0.5
    positions = mx.zeros(40, dtype=mx.int32)  # position 0 is not rotated
    assert np.abs(np.array(ours.indexer.key_rows(mx.array(x), positions)) - k).max() < 1e-5
    assert np.abs(np.array(ours.indexer.head_weights(mx.array(x))) - w).max() < 1e-6
    ours.indexer.k_norm.eps = 1e-5
    assert np.abs(np.array(ours.indexer.key_rows(mx.array(x), positions)) - k).max() > 1e-2


@pytest.mark.parametrize("max_elements", [1, 3 * 16 * 7, 2**24])  # a key at a time, 7 of 20, all
@pytest.mark.parametrize("uses_numpy", [False, True])
def test_scores_are_float32_whatever_the_keys_are_kept_in(max_elements: int, uses_numpy: bool) -> None:
    arithmetic = replace(CPU, tile_elements=max_elements, uses_numpy=uses_numpy)
    q, w = mx.random.normal((3, 16, 8)), mx.random.normal((3, 16))
    keys = mx.random.normal((20, 8)).astype(mx.bfloat16)
    got = index_scores(q, w, keys, arithmetic)
    want = (mx.maximum(q @ keys.astype(mx.float32).T / 8**0.5, 0) * w[..., None]).sum(axis=1)
    assert got.dtype == mx.float32
    assert np.abs(np.array(got - want)).max() < 1e-5


def best_by_hand(scores: list[float], visible: int, k: int) -> set[int]:
    order = sorted(range(visible), key=lambda i: (-scores[i], i))
    return set(order[:k])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=30), st.integers(1, 30), st.data()
)
def test_selection_takes_the_best_and_among_equals_the_first(
    scores: list[float], k: int, data: st.DataObject
) -> None:
    k, visible = min(k, len(scores)), data.draw(st.integers(1, len(scores)))
    mask = mx.arange(len(scores))[None, :] < visible
    for kth_best in (kth_by_partition, kth_by_bits, kth_by_numpy):
        chosen = select(mx.array([scores]), mask, k, kth_best)
        assert set(np.flatnonzero(np.array(chosen)[0]).tolist()) == best_by_hand(scores, visible, k)
    positions = np.array(selected_positions(chosen, k))[0].tolist()
    assert positions == sorted(positions)
    assert {p for p in positions if p < len(scores)} == best_by_hand(scores, visible, k)


@pytest.mark.parametrize("kth_best", [kth_by_bits, kth_by_numpy])
@pytest.mark.parametrize(
    "values",
    [
        [0.0, -0.0, 0.0],
        [1e-45, 0.0, -1e-45],
        [3e38, -3e38, math.inf],
        [-math.inf, -1.0, -1.0],
        [0.1, 0.1, 0.1],
    ],
)
def test_every_way_to_the_kth_best_score_gives_the_same_selection(
    kth_best: Callable[[mx.array, int], mx.array], values: list[float]
) -> None:
    """Also of scores that only their bits tell apart, and where bits differ and the order does not."""
    scores = mx.array(np.random.default_rng(0).choice(values, (20, 40)).astype(np.float32))
    visible = causal_mask(20, 20, 40)
    for k in (1, 7, 20, 39):
        assert mx.array_equal(select(scores, visible, k, kth_best), select(scores, visible, k))


def test_metal_sorts_no_scores() -> None:
    def selected(arithmetic: Arithmetic) -> str:
        ops = io.StringIO()
        mx.export_to_dot(ops, arithmetic.kth_best(mx.random.normal((4, 64)), 8))
        return ops.getvalue()

    assert "Partition" in selected(replace(METAL, selects_by_bits=False))
    assert "Partition" not in selected(METAL)


def test_the_selection_of_a_row_does_not_depend_on_how_rows_are_cut_into_parts() -> None:
    scores = mx.round(mx.random.normal((12, 12)) * 2) / 2  # many ties
    whole = select(scores, causal_mask(0, 12, 12), 3)
    for cut in range(1, 12):
        first = select(scores[:cut], causal_mask(0, cut, 12), 3)
        second = select(scores[cut:], causal_mask(cut, 12 - cut, 12), 3)
        assert mx.array_equal(mx.concatenate([first, second]), whole)
