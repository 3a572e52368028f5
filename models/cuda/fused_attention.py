"""Attention of few rows in few kernels: a step of one layer is a dozen. Called by `models.arithmetic`.

Every function is compiled once for its number of rows and the sizes of the caches.
"""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from models.cuda import choices, few_rows, products
from models.cuda.products import parts_of


class AttentionLayer(Protocol):
    """One layer's attention, by the checkpoint's names; without an indexer in a shared layer."""

    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj_with_mqa: Any
    kv_a_layernorm: Any
    embed_q: Any
    unembed_out: Any
    o_proj: Any

    @property
    def periods(self) -> mx.array:
        """Of the pairs that are rotated, float32."""
        ...

    def __contains__(self, name: str, /) -> bool: ...

    def __getitem__(self, name: str, /) -> Any: ...


class FusedAttention:
    """The steps of a layer's attention between which the caches are written."""

    def __init__(self, layer: AttentionLayer, group_size: int, top_k: int, scale: float) -> None:
        self._layer, self._group_size, self._top_k, self._scale = layer, group_size, top_k, scale
        self._periods = layer.periods
        self.project: Callable[[mx.array, mx.array], list[mx.array]] = mx.compile(self._project)
        self.select: Callable[..., mx.array] = mx.compile(self._select)
        self.attend: Callable[..., mx.array] = mx.compile(self._attend)
        self.finish: Callable[[mx.array, mx.array], mx.array] = mx.compile(self._finish)

    def _project(self, x: mx.array, positions: mx.array) -> list[mx.array]:
        """What rows x [n, H] bring: queries [n, heads, latent], rows of the cache [n, latent] and, in a full
        layer, index keys [n, D], index queries and weights of their heads, for `select`."""
        layer, rotation = self._layer, (self._periods, positions)
        first, second = [layer.q_a_proj, layer.kv_a_proj_with_mqa], [layer.q_b_proj]
        index: list[mx.array] = []
        norms = (layer.q_a_layernorm.weight, layer.kv_a_layernorm.weight)
        if "indexer" not in layer:
            q, kv = self._each(x, first)
            residual, rows = few_rows.norm_rows(q, kv, norms, rotation, None)
            [queries] = self._each(residual, second)
        else:
            indexer = layer["indexer"]
            q, kv, keys, weights = self._each(x, [*first, indexer.wk, indexer.weights_proj], num_exact=2)
            norm = (keys, indexer.k_norm.weight, indexer.k_norm.bias)
            residual, rows, keys = few_rows.norm_rows(q, kv, norms, rotation, norm)
            queries, index_queries = self._each(residual, [*second, indexer.wq_b], num_exact=1)
            index = [keys, index_queries, weights]
        heads = queries.reshape(x.shape[0], layer.embed_q.weight.shape[0], -1)
        rotated = (2 * self._periods.size, *rotation)
        return [
            products.multiply_heads(heads, parts_of(layer.embed_q), self._group_size, rotated), rows, *index
        ]  # fmt: skip

    def _select(self, queries: mx.array, weights: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
        """Positions of the keys that rows attend to, int32 [n, k], from the whole array of index keys."""
        scores = few_rows.index_scores(queries, weights, keys, (self._periods, positions))
        return choices.best_positions(scores, self._top_k, positions)

    def _attend(
        self, queries: mx.array, keys: mx.array, positions: mx.array, chosen: mx.array | None = None
    ) -> mx.array:
        """queries [n, heads, latent] -> [n, heads, kv_lora], from the whole array of a cache's rows.

        Without `chosen` no row stands behind the first `top_k`.
        """
        values = self._layer.unembed_out.weight.shape[-1] * 8
        return few_rows.attend(queries, keys, positions, chosen, self._top_k, values, self._scale)

    def _finish(self, out: mx.array, onto: mx.array) -> mx.array:
        """Out of the latent space and on top of `onto`: [n, heads, kv_lora] -> [n, H]."""
        layer, group_size = self._layer, self._group_size
        values = products.multiply_heads(out, parts_of(layer.unembed_out), group_size)
        flat = values.reshape(out.shape[0], -1)
        return products.multiply(flat, [parts_of(layer.o_proj)], group_size, added=onto)

    def _each(self, x: mx.array, weights: list[Any], num_exact: int = 0) -> list[mx.array]:
        """x with each of the weights; the last `num_exact` outputs stay float32."""
        dtypes = [x.dtype] * (len(weights) - num_exact) + [mx.float32] * num_exact
        return products.multiply_each(x, [parts_of(w) for w in weights], self._group_size, dtypes)
