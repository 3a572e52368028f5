"""The faults that circulate in other implementations (reference, section 15, test 5), to be planted.

Each patches the model's code; a model built afterwards has the fault. The parity test must notice every one,
and `training/pocket/evaluation/planted_faults.py` counts how many keys Pocket still finds with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import models.experts.router
from models.args import ModelArgs
from models.attention.attention import Attention, RowPart
from models.attention.indexer import Indexer
from models.attention.rope import Rope
from models.attention.selection import select
from models.experts.router import Router
from tests.tiny_glm import SHARED

Plant = Callable[[pytest.MonkeyPatch], None]


def half_split_indexer_rope(patch: pytest.MonkeyPatch) -> None:
    def half_split(self: Rope, x: mx.array, positions: mx.array) -> mx.array:
        rotated = mx.fast.rope(
            x[:, :, None, :], self.dims, traditional=False, base=None, scale=1.0,
            offset=positions, freqs=self._periods,
        )  # fmt: skip
        return rotated[:, :, 0, :]

    _patch_indexer_rope(patch, half_split)


def indexer_rotates_last_dims(patch: pytest.MonkeyPatch) -> None:
    def last_dims(self: Rope, x: mx.array, positions: mx.array) -> mx.array:
        passed, rotary = mx.split(x, [x.shape[-1] - self.dims], axis=-1)
        return mx.concatenate([passed, Rope.__call__(self, rotary, positions)], axis=-1)

    _patch_indexer_rope(patch, last_dims)


def _patch_indexer_rope(patch: pytest.MonkeyPatch, call: Callable[..., mx.array]) -> None:
    class WrongRope(Rope):
        __call__ = call

    patch.setattr("models.attention.indexer.Rope", WrongRope)


def shared_layers_are_dense(patch: pytest.MonkeyPatch) -> None:
    right = Attention._attend

    def attend(self: Attention, q: mx.array, keys: mx.array, selected: Any, in_flight: Any) -> mx.array:
        return right(self, q, keys, selected if "indexer" in self else None, in_flight)

    patch.setattr(Attention, "_attend", attend)


def shared_layers_use_the_previous_group(patch: pytest.MonkeyPatch) -> None:
    right = Attention.__call__
    older: dict[tuple[int, int], Any] = {}  # what the group before selected for these rows

    def call(self: Attention, x: mx.array, part: RowPart, onto: mx.array) -> mx.array:
        rows = (part.rows.start, part.rows.stop)
        if "indexer" in self:
            older[rows] = part.selected
            return right(self, x, part, onto)
        newest, part.selected = part.selected, older[rows] or part.selected
        out = right(self, x, part, onto)
        part.selected = newest
        return out

    patch.setattr(Attention, "__call__", call)


def no_relu(patch: pytest.MonkeyPatch) -> None:
    def scores(queries: mx.array, weights: mx.array, keys: mx.array, *_: Any) -> mx.array:
        return (weights[:, None, :] @ (queries @ keys.T))[:, 0, :]

    patch.setattr("models.attention.tiles.index_scores", scores)


def head_weights_lose_their_sign(patch: pytest.MonkeyPatch) -> None:
    right = Indexer.head_weights
    patch.setattr(Indexer, "head_weights", lambda self, x: mx.abs(right(self, x)))


def bias_in_expert_weights(patch: pytest.MonkeyPatch) -> None:
    right = models.experts.router.expert_weights

    def call(self: Router, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        scores = mx.sigmoid(x @ self.weight.T) + self.e_score_correction_bias
        ids = models.experts.router.best_experts(scores, self._args.num_experts_per_tok)
        return ids, right(scores, ids, self._args), scores

    patch.setattr(Router, "__call__", call)


def no_bias_in_choice(patch: pytest.MonkeyPatch) -> None:
    def call(self: Router, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        scores = mx.sigmoid(x @ self.weight.T)
        ids = models.experts.router.best_experts(scores, self._args.num_experts_per_tok)
        return ids, models.experts.router.expert_weights(scores, ids, self._args), scores

    patch.setattr(Router, "__call__", call)


def no_routed_scaling(patch: pytest.MonkeyPatch) -> None:
    _replace_args(patch, routed_scaling_factor=1.0)


def no_norm_topk(patch: pytest.MonkeyPatch) -> None:
    _replace_args(patch, norm_topk_prob=False)


def _replace_args(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    right = ModelArgs.from_config
    patch.setattr(ModelArgs, "from_config", lambda config: dataclasses.replace(right(config), **changes))


def head_dim_as_rotary_width(patch: pytest.MonkeyPatch, head_dim: int = SHARED["head_dim"]) -> None:
    class WideRope(Rope):
        def __init__(self, dims: int, theta: float) -> None:
            super().__init__(head_dim, theta)
            self.dims, self._periods = dims, self._periods[: dims // 2]

    patch.setattr("models.attention.indexer.Rope", WideRope)
    patch.setattr("models.attention.attention.Rope", WideRope)


def forced_sinks(patch: pytest.MonkeyPatch) -> None:
    def with_sinks(scores: mx.array, visible: mx.array, k: int, kth_best: Any) -> mx.array:
        first = mx.arange(scores.shape[-1]) < 2
        return select(mx.where(first, mx.inf, scores), visible, k, kth_best)

    patch.setattr("models.attention.tiles.select", with_sinks)


def forced_window(patch: pytest.MonkeyPatch) -> None:
    def with_window(scores: mx.array, visible: mx.array, k: int, kth_best: Any) -> mx.array:
        age = visible.sum(axis=-1, keepdims=True) - 1 - mx.arange(scores.shape[-1])
        return select(mx.where(age < 3, mx.inf, scores), visible, k, kth_best)

    patch.setattr("models.attention.tiles.select", with_window)


def one_key_too_many(patch: pytest.MonkeyPatch) -> None:
    def one_more(scores: mx.array, visible: mx.array, k: int, kth_best: Any) -> mx.array:
        return select(scores, visible, k + 1, kth_best)

    patch.setattr("models.attention.tiles.select", one_more)


def unnormed_latent(patch: pytest.MonkeyPatch) -> None:
    right = Attention._latent_rows

    def rows(self: Attention, x: mx.array, positions: mx.array) -> mx.array:
        latent = self.kv_a_proj_with_mqa(x)[:, : self._args.kv_lora_rank]
        return mx.concatenate([latent, right(self, x, positions)[:, latent.shape[1] :]], axis=-1)

    patch.setattr(Attention, "_latent_rows", rows)


MUTANTS: list[Plant] = [
    half_split_indexer_rope,
    indexer_rotates_last_dims,
    shared_layers_are_dense,
    shared_layers_use_the_previous_group,
    no_relu,
    head_weights_lose_their_sign,
    bias_in_expert_weights,
    no_bias_in_choice,
    no_routed_scaling,
    no_norm_topk,
    head_dim_as_rotary_width,
    forced_sinks,
    forced_window,
    one_key_too_many,
    unnormed_latent,
]
