"""The indexer of DeepSeek Sparse Attention: which keys a query may attend to. Called by attention.

Numerics follow transformers 5.24, `GlmMoeDsaIndexer`: scores and head weights in float32, LayerNorm with
epsilon 1e-6, interleaved rotation of the FIRST rotary dimensions of each head.
"""

import mlx.core as mx
import mlx.nn as nn

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.attention.rope import Rope
from models.in_flight import InFlight
from models.linear import Linear


class Indexer(nn.Module):
    """Makes index keys for the cache, and scores queries against them."""

    def __init__(self, args: ModelArgs, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.num_heads, self.head_dim = args.index_n_heads, args.index_head_dim
        self.wq_b = Linear(args.q_lora_rank, self.num_heads * self.head_dim, arithmetic)
        self.wk = Linear(args.hidden_size, self.head_dim, arithmetic)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = Linear(args.hidden_size, self.num_heads, arithmetic)
        self._rope = Rope(args.qk_rope_head_dim, args.rope_theta)

    def key_rows(self, x: mx.array, positions: mx.array) -> mx.array:
        """Index keys of the rows x [N, H] -> [N, D]."""
        k = self.k_norm(self.wk(x).astype(mx.float32))
        return self._rope(k[:, None, :], positions)[:, 0, :]

    def query_rows(self, q_residual: mx.array, positions: mx.array) -> mx.array:
        """Index queries of the rows, from the normed query residual [N, q_lora] -> [N, heads, D], float32."""
        q = self.wq_b(q_residual).astype(mx.float32)
        return self._rope(q.reshape(-1, self.num_heads, self.head_dim), positions)

    def head_weights(self, x: mx.array) -> mx.array:
        """How much each head's score counts, x [N, H] -> float32 [N, heads]; may be negative."""
        return self.weights_proj(x.astype(mx.float32)).astype(mx.float32) * self.num_heads**-0.5


def index_scores(
    queries: mx.array,
    weights: mx.array,
    keys: mx.array,
    arithmetic: Arithmetic,
    in_flight: InFlight | None = None,
) -> mx.array:
    """sum over heads of w_h relu(q_h . k / sqrt(D)): [N, heads, D], [N, heads], [T, D] -> float32 [N, T].

    Heads are kept apart for `tile_elements` at most: so many keys are scored at a time, each time as a piece.
    """
    rows, heads, width = queries.shape
    queries, num_keys = queries * width**-0.5, max(1, arithmetic.tile_elements // (rows * heads))
    scores = []
    for first in range(0, keys.shape[0], num_keys):
        scores.append(arithmetic.index_scores(queries, weights, keys[first : first + num_keys]))
        if in_flight:
            in_flight.launch(scores[-1])
    return scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=1)
