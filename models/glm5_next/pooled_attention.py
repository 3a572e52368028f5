"""Sparse attention without rotation whose indexer selects pools of keys. Called by the decoder block.

Numerics follow transformers 5.24, `Glm5NextTextAttention` and `Glm5NextTextIndexer`: a pool of `index_kpool`
tokens has one index key, a mean weighted by a learned softmax in each channel. A row selects among the pools
that end at or before it, and always sees the tokens behind the last of them.
"""

from typing import cast

import mlx.core as mx

from models.arithmetic import Arithmetic, Dense
from models.attention.attention import Attention, Span
from models.attention.indexer import Indexer
from models.attention.tiles import Tile
from models.glm5_next.delta_attention import state_of
from models.glm5_next.flash_args import FlashArgs
from models.glm5_next.flash_cache import FlashCache
from models.glm5_next.pooled_selection import select_pools
from models.in_flight import InFlight


class PooledIndexer(Indexer):
    """Makes raw index keys and gates for the cache, and keys of pools of them."""

    def __init__(self, args: FlashArgs, arithmetic: Arithmetic) -> None:
        super().__init__(args, arithmetic)
        self._arithmetic = arithmetic
        self.index_kpool_compress_ape = mx.zeros((args.index_kpool, args.index_head_dim))
        self.index_kpool_compress_gate = mx.zeros((args.index_head_dim, args.hidden_size), arithmetic.dtype)

    def key_rows(self, x: mx.array, positions: mx.array) -> mx.array:
        """Raw index keys of the rows x [N, H], then gates: [N, 2 D]."""
        keys = self.k_norm(self.wk(x).astype(mx.float32))
        gates = self._arithmetic.product(x, Dense(self.index_kpool_compress_gate))
        return mx.concatenate([keys, gates.astype(mx.float32)], axis=-1)

    def query_rows(self, q_residual: mx.array, positions: mx.array) -> mx.array:
        """Index queries of the rows, from the normed query residual [N, q_lora] -> float32 [N, heads, D]."""
        return self.wq_b(q_residual).astype(mx.float32).reshape(-1, self.num_heads, self.head_dim)

    def pooled(self, raw: mx.array) -> mx.array:
        """Keys of full pools, from raw rows [pools * size, 2 D] -> float32 [pools, D]."""
        size = self.index_kpool_compress_ape.shape[0]
        keys, gates = mx.split(raw.astype(mx.float32).reshape(-1, size, raw.shape[1]), 2, axis=-1)
        weights = mx.softmax(gates + self.index_kpool_compress_ape.astype(mx.float32), axis=1, precise=True)
        return (weights * keys).sum(axis=1)


class PooledAttention(Attention):
    """One sparse layer; its queries and keys know no positions."""

    _args: FlashArgs

    def _make_indexer(self) -> Indexer:
        return PooledIndexer(self._args, self._arithmetic)

    def _latent_queries(self, q_residual: mx.array, positions: mx.array) -> mx.array:
        """Queries against cached latents, [heads, N, latent]."""
        args = self._args
        q = self.q_b_proj(q_residual).reshape(-1, args.num_attention_heads, args.qk_head_dim)
        return self.embed_q(q.transpose(1, 0, 2))

    def _latent_rows(self, x: mx.array, positions: mx.array) -> mx.array:
        """What the cache keeps of each row: the normed latent."""
        return self.kv_a_layernorm(self.kv_a_proj_with_mqa(x))

    @property
    def _most_selected(self) -> int:
        return self._args.topk_pools

    def _select(
        self,
        span: Span,
        queries: mx.array,
        weights: mx.array,
        keys: mx.array,
        in_flight: InFlight | None,
    ) -> list[Tile]:
        num_keys = cast(FlashCache, span.cache).latents[self._layer].length
        return select_pools(
            queries, weights, keys, num_keys, self._args, arithmetic=self._arithmetic, in_flight=in_flight
        )

    def _add_keys(self, span: Span, new_keys: mx.array) -> mx.array:
        """Appends a span's raw rows, out of the forward's [N, 2 D]; returns its full pools' keys, [P, D]."""
        rows = span.cut(new_keys)
        cache, state = state_of(span, self._layer)
        pools, size = cache.index_keys[self._layer], self._args.index_kpool
        if span.origin:
            pools.adopt(cast(FlashCache, span.origin).index_keys[self._layer], span.num_shared)
        [rest] = state.arrays
        raw = mx.concatenate([rest, rows.astype(rest.dtype)])
        begin = state.length - rest.shape[0]
        for mark in cache.marks_between(state.length, state.length + span.rows):
            kept = slice((mark - begin) // size * size, mark - begin)
            state.mark(mark, (mx.contiguous(raw[kept]),))
        full = raw.shape[0] // size * size
        state.advance((mx.contiguous(raw[full:]),), span.rows)
        if full:
            pools.append(cast(PooledIndexer, self.indexer).pooled(raw[:full]))
        return pools.rows(0, pools.length)
