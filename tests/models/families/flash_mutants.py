"""The faults that a `glm5_next` implementation is likely to have, planted as in mutants.py."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import models.glm5_next.pooled_selection as selection
from models.arithmetic import Arithmetic
from models.attention.rope import Rope
from models.attention.selection import select
from models.glm5_next import delta_attention
from models.glm5_next.delta_attention import DeltaAttention
from models.glm5_next.flash_args import FlashArgs
from models.glm5_next.flash_model import FlashModel
from models.glm5_next.hyper_connection import HyperConnection
from models.glm5_next.pooled_attention import PooledAttention, PooledIndexer
from models.glm_moe_dsa import Model
from tests.models.mutants import Plant


def sum_of_streams(patch: pytest.MonkeyPatch) -> None:
    def last_norm(self: FlashModel, x: mx.array) -> mx.array:
        return Model._last_norm(self, x.reshape(x.shape[0], self.args.hc_mult, -1).sum(axis=1))

    patch.setattr(FlashModel, "_last_norm", last_norm)


def inner_norms_with_a_fixed_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlashArgs, "inner_norm_eps", 1e-6)


def output_norm_with_a_fixed_epsilon(patch: pytest.MonkeyPatch) -> None:
    right = delta_attention.HeadNorm.__init__
    patch.setattr(delta_attention.HeadNorm, "__init__", lambda self, width, eps: right(self, width, 1e-6))


def stream_norm_with_a_fixed_epsilon(patch: pytest.MonkeyPatch) -> None:
    def norm(x: mx.array, weight: Any, eps: float) -> mx.array:
        normed = x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + (1e-6 if weight is None else eps))
        return normed if weight is None else normed * weight

    patch.setattr("models.glm5_next.hyper_connection.mx.fast.rms_norm", norm)


def lower_bound_as_a_clamp(patch: pytest.MonkeyPatch) -> None:
    def gates(self: DeltaAttention, x: mx.array) -> tuple[mx.array, mx.array]:
        args = self._args
        raw = self.f_b_proj(self.f_a_proj(x)) + self.dt_bias
        raw = raw.reshape(-1, args.linear_num_heads, args.linear_head_dim)
        gate = mx.maximum(-mx.exp(self.A_log)[:, None] * nn.softplus(raw), args.linear_lower_bound)
        return gate, mx.sigmoid(self.b_proj(x))

    patch.setattr(DeltaAttention, "_gates", gates)


def unfinished_pools_are_selected(patch: pytest.MonkeyPatch) -> None:
    def chosen(scores: mx.array, positions: mx.array, args: FlashArgs, arithmetic: Any) -> mx.array:
        starts = mx.arange(scores.shape[1]) * args.index_kpool
        return select(scores, starts[None, :] <= positions[:, None], args.topk_pools)

    patch.setattr(selection, "_chosen", chosen)


def the_tail_is_hidden(patch: pytest.MonkeyPatch) -> None:
    right_mask, right_positions = selection._mask, selection._positions

    def mask(chosen: mx.array, positions: mx.array, num_keys: int, args: FlashArgs) -> mx.array:
        seen = right_mask(chosen, positions, num_keys, args)
        first = (positions[:, None] + 1) // args.index_kpool * args.index_kpool
        return seen & ((mx.arange(num_keys) < first) | (first == 0))

    def gathered(chosen: mx.array, positions: mx.array, num_keys: int, args: FlashArgs) -> mx.array:
        found = right_positions(chosen, positions, num_keys, args)
        first = (positions[:, None] + 1) // args.index_kpool * args.index_kpool
        return mx.where((found < first) | (first == 0), found, num_keys)

    patch.setattr(selection, "_mask", mask)
    patch.setattr(selection, "_positions", gathered)


def pools_are_plain_means(patch: pytest.MonkeyPatch) -> None:
    def pooled(self: PooledIndexer, raw: mx.array) -> mx.array:
        size = self.index_kpool_compress_ape.shape[0]
        return raw[:, : self.head_dim].reshape(-1, size, self.head_dim).mean(axis=1)

    patch.setattr(PooledIndexer, "pooled", pooled)


def pools_without_their_embedding(patch: pytest.MonkeyPatch) -> None:
    def pooled(self: PooledIndexer, raw: mx.array) -> mx.array:
        size = self.index_kpool_compress_ape.shape[0]
        keys, gates = mx.split(raw.reshape(-1, size, raw.shape[1]), 2, axis=-1)
        return (mx.softmax(gates, axis=1) * keys).sum(axis=1)

    patch.setattr(PooledIndexer, "pooled", pooled)


def rotated_index_queries(patch: pytest.MonkeyPatch) -> None:
    keys, queries = PooledIndexer.key_rows, PooledIndexer.query_rows
    rope = Rope(8, 10000.0)

    def rotated_keys(self: PooledIndexer, x: mx.array, positions: mx.array) -> mx.array:
        return rope(keys(self, x, positions)[:, None], positions)[:, 0]

    def rotated_queries(self: PooledIndexer, q: mx.array, positions: mx.array) -> mx.array:
        return rope(queries(self, q, positions), positions)

    patch.setattr(PooledIndexer, "key_rows", rotated_keys)
    patch.setattr(PooledIndexer, "query_rows", rotated_queries)


def rotated_latents(patch: pytest.MonkeyPatch) -> None:
    right = PooledAttention._latent_rows
    rope = Rope(8, 10000.0)

    def rows(self: PooledAttention, x: mx.array, positions: mx.array) -> mx.array:
        return rope(right(self, x, positions)[:, None], positions)[:, 0]

    patch.setattr(PooledAttention, "_latent_rows", rows)


def unbounded_swiglu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlashArgs, "gate_limit", float("inf"))


def gate_bounded_on_both_sides(patch: pytest.MonkeyPatch) -> None:
    def gated(self: Arithmetic, gate: mx.array, up: mx.array) -> mx.array:
        limit = self.swiglu_limit
        return nn.silu(mx.clip(gate, -limit, limit)) * mx.clip(up, -limit, limit)

    patch.setattr(Arithmetic, "gated", gated)


def mix_is_transposed(patch: pytest.MonkeyPatch) -> None:
    right = HyperConnection._doubly_stochastic
    patch.setattr(HyperConnection, "_doubly_stochastic", lambda self, x: right(self, x).swapaxes(1, 2))


def one_round_of_sinkhorn(patch: pytest.MonkeyPatch) -> None:
    def once(self: HyperConnection, logits: mx.array) -> mx.array:
        among = mx.softmax(logits, axis=-1)
        return among / among.sum(axis=-2, keepdims=True)

    patch.setattr(HyperConnection, "_doubly_stochastic", once)


def keys_keep_their_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(delta_attention, "_unit", lambda x: x)


def the_state_forgets_after_reading(patch: pytest.MonkeyPatch) -> None:
    def by_chunks(state: mx.array, *rows: Any) -> tuple[mx.array, mx.array]:
        *arrays, _ = rows
        outs = []
        for q, k, v, gate, beta in zip(*arrays, strict=True):
            held = (k[:, None, :] @ state)[:, 0]
            state = state + k[..., None] * ((v - held) * beta[:, None])[:, None, :]
            outs.append((q[:, None, :] @ state)[:, 0])
            state = state * mx.exp(gate)[..., None]
        return mx.stack(outs), state

    patch.setattr(delta_attention, "by_chunks", by_chunks)


def the_convolution_sees_no_past(patch: pytest.MonkeyPatch) -> None:
    right = DeltaAttention._convolved

    def convolved(self: DeltaAttention, inputs: mx.array, rows: int) -> list[mx.array]:
        before = inputs.shape[0] - rows
        blank = mx.zeros_like(inputs[:before])
        alone = [mx.concatenate([blank, inputs[before + i : before + i + 1]]) for i in range(rows)]
        made = [right(self, one, 1) for one in alone]
        return [mx.concatenate(list(column)) for column in zip(*made, strict=True)]

    patch.setattr(DeltaAttention, "_convolved", convolved)


FLASH_MUTANTS: list[Plant] = [
    sum_of_streams,
    inner_norms_with_a_fixed_epsilon,
    output_norm_with_a_fixed_epsilon,
    stream_norm_with_a_fixed_epsilon,
    lower_bound_as_a_clamp,
    unfinished_pools_are_selected,
    the_tail_is_hidden,
    pools_are_plain_means,
    pools_without_their_embedding,
    rotated_index_queries,
    rotated_latents,
    unbounded_swiglu,
    gate_bounded_on_both_sides,
    mix_is_transposed,
    one_round_of_sinkhorn,
    keys_keep_their_length,
    the_state_forgets_after_reading,
    the_convolution_sees_no_past,
]
