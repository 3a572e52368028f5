"""Multi-head latent attention over the keys that the indexer selected. Called by the decoder block.

Always in absorbed form: queries are moved into the latent space (`embed_q`), attend to the cached latents
themselves, and the result is moved out again (`unembed_out`). One form for prefill and decode means one
set of numbers. Memory is bounded by tiles of queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from models.args import FULL, ModelArgs
from models.arithmetic import Arithmetic
from models.cache import SequenceCache
from models.indexer import Indexer, index_scores
from models.linear import Linear
from models.rope import Rope
from models.selection import causal_mask, select, selected_positions

# Elements of the largest intermediate of a tile (64 MiB in float32), and its rows: keys behind the last row
# of a tile are never touched, so small tiles save up to half of a long prompt's work.
TILE_ELEMENTS = 2**24
TILE_ROWS = 256
# Rows of one span up to which the selected latents are gathered; more rows use a mask over all keys.
# Both forms compute the same sums; see docs/measurements.md for the crossover.
_GATHER_ROWS = 8


@dataclass(frozen=True)
class Span:
    """Rows start to stop of a flat batch: the next tokens of the sequence that owns `cache`."""

    cache: SequenceCache
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Tile:
    """Rows start to stop of a span and the keys they attend to, among the first `num_keys`.

    `keys` is a mask bool [rows, num_keys], or positions int32 [rows, k] with `num_keys` standing for
    nothing, or None where all keys are attended to.
    """

    start: int
    stop: int
    num_keys: int
    keys: mx.array | None


@dataclass
class FlatBatch:
    """One forward's rows: spans, positions, and the selection that full layers hand to shared ones.

    `selected[i]` belongs to spans[i]; None while every earlier key may be seen. It lives for one forward.
    """

    spans: Sequence[Span]
    positions: mx.array  # int32 [N]
    selected: list[list[Tile] | None] = field(default_factory=list)


def make_batch(spans: Sequence[Span]) -> FlatBatch:
    """Positions of all rows, from the length of each span's cache."""
    positions = [mx.arange(s.cache.length, s.cache.length + s.rows) for s in spans]
    return FlatBatch(spans, mx.concatenate(positions).astype(mx.int32))


class Attention(nn.Module):
    """One layer's attention, with its own indexer (full layer) or without (shared layer)."""

    def __init__(self, args: ModelArgs, layer: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._args, self._layer = args, layer
        self._dtype = arithmetic.dtype
        heads = args.num_attention_heads
        # The eps of the two inner norms is fixed at 1e-6 in the reference, whatever rms_norm_eps says.
        self.q_a_proj = Linear(args.hidden_size, args.q_lora_rank, arithmetic)
        self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=1e-6)
        self.q_b_proj = Linear(args.q_lora_rank, heads * args.qk_head_dim, arithmetic)
        self.kv_a_proj_with_mqa = Linear(args.hidden_size, args.latent_dim, arithmetic)
        self.kv_a_layernorm = nn.RMSNorm(args.kv_lora_rank, eps=1e-6)
        self.embed_q = Linear(args.qk_nope_head_dim, args.kv_lora_rank, arithmetic, num_heads=heads)
        self.unembed_out = Linear(args.kv_lora_rank, args.v_head_dim, arithmetic, num_heads=heads)
        self.o_proj = Linear(heads * args.v_head_dim, args.hidden_size, arithmetic)
        if args.indexer_types[layer] == FULL:
            self.indexer = Indexer(args, arithmetic)
        self._rope = Rope(args.qk_rope_head_dim, args.rope_theta)

    def __call__(self, x: mx.array, batch: FlatBatch) -> mx.array:
        """x [N, H] -> [N, H]; appends this layer's rows to the caches of the spans."""
        q_residual = self.q_a_layernorm(self.q_a_proj(x))
        queries = self._latent_queries(q_residual, batch.positions)  # [heads, N, latent]
        rows = self._latent_rows(x, batch.positions)  # [N, latent]
        keys = [s.cache.latents[self._layer].append(rows[s.start : s.stop]) for s in batch.spans]
        if "indexer" in self:
            self._update_selection(x, q_residual, batch)
        outs = [
            self._attend(queries[:, span.start : span.stop], span_keys, selected)
            for span, span_keys, selected in zip(batch.spans, keys, batch.selected, strict=True)
        ]
        out = self.unembed_out(mx.concatenate(outs, axis=1))  # [heads, N, v]
        return self.o_proj(out.transpose(1, 0, 2).reshape(x.shape[0], -1))

    def _latent_queries(self, q_residual: mx.array, positions: mx.array) -> mx.array:
        """Queries against cached rows: the nope part in latent space, then the rotated part."""
        args = self._args
        q = self.q_b_proj(q_residual).reshape(-1, args.num_attention_heads, args.qk_head_dim)
        nope, rotary = mx.split(q, [args.qk_nope_head_dim], axis=-1)
        rotary = self._rope(rotary, positions).transpose(1, 0, 2)
        return mx.concatenate([self.embed_q(nope.transpose(1, 0, 2)), rotary], axis=-1)

    def _latent_rows(self, x: mx.array, positions: mx.array) -> mx.array:
        """What the cache keeps of each row: normed latent, then rotated shared key."""
        latent, rotary = mx.split(self.kv_a_proj_with_mqa(x), [self._args.kv_lora_rank], axis=-1)
        rotary = self._rope(rotary[:, None, :], positions)[:, 0, :]
        return mx.concatenate([self.kv_a_layernorm(latent), rotary], axis=-1)

    def _update_selection(self, x: mx.array, q_residual: mx.array, batch: FlatBatch) -> None:
        """Write the index keys of all spans, then score where there are more keys than may be selected."""
        k, new_keys = self._args.index_topk, self.indexer.key_rows(x, batch.positions)
        stores = [span.cache.index_keys[self._layer] for span in batch.spans]
        for span, store in zip(batch.spans, stores, strict=True):
            store.append(new_keys[span.start : span.stop])
        batch.selected = [None] * len(batch.spans)
        if all(store.length <= k for store in stores):
            return
        queries = self.indexer.query_rows(q_residual, batch.positions)
        weights = self.indexer.head_weights(x)
        for i, (span, store) in enumerate(zip(batch.spans, stores, strict=True)):
            if store.length > k:
                rows = slice(span.start, span.stop)
                batch.selected[i] = select_tiles(queries[rows], weights[rows], store.rows(0, store.length), k)

    def _attend(self, queries: mx.array, keys: mx.array, selected: list[Tile] | None) -> mx.array:
        """queries [heads, n, latent], keys [T, latent] -> [heads, n, kv_lora]."""
        heads, rows, _ = queries.shape
        tiles = selected if selected is not None else causal_tiles(rows, keys.shape[0], heads)
        outs = []
        for tile in tiles:
            q, seen = queries[:, tile.start : tile.stop], keys[: tile.num_keys]
            if tile.keys is None or tile.keys.dtype == mx.bool_:
                outs.append(self._attend_masked(q, seen, tile.keys))
            else:
                outs.append(self._attend_gathered(q, seen, tile.keys))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def _attend_masked(self, q: mx.array, keys: mx.array, visible: mx.array | None) -> mx.array:
        """All keys, those not visible [n, T] at -inf."""
        scores = (q * self._args.qk_head_dim**-0.5) @ keys.T  # [heads, n, T]
        weights = softmax(scores if visible is None else mx.where(visible, scores, -mx.inf))
        return weights.astype(self._dtype) @ keys[:, : self._args.kv_lora_rank]

    def _attend_gathered(self, q: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
        """Only the selected keys, positions [n, k]; a position of T stands for nothing."""
        num_keys = keys.shape[0]
        chosen = keys[mx.minimum(positions, num_keys - 1)]  # [n, k, latent]
        q = q.swapaxes(0, 1) * self._args.qk_head_dim**-0.5  # [n, heads, latent]
        scores = q @ chosen.swapaxes(-1, -2)  # [n, heads, k]
        weights = softmax(mx.where((positions < num_keys)[:, None, :], scores, -mx.inf))
        out = weights.astype(self._dtype) @ chosen[..., : self._args.kv_lora_rank]
        return out.swapaxes(0, 1)


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, accumulated in float32 as in the reference."""
    return mx.softmax(scores, axis=-1, precise=True)


def cut_tiles(rows: int, num_keys: int, heads: int) -> Iterator[tuple[int, int, int]]:
    """Cut the last `rows` of num_keys into tiles: start, stop, and the number of keys up to the last row."""
    height = max(1, min(TILE_ROWS, TILE_ELEMENTS // (heads * num_keys)))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        yield start, stop, num_keys - rows + stop


def causal_tiles(rows: int, num_keys: int, heads: int) -> Iterator[Tile]:
    """Tiles in which each row sees every key up to itself."""
    for start, stop, seen in cut_tiles(rows, num_keys, heads):
        height = stop - start
        yield Tile(start, stop, seen, None if height == 1 else causal_mask(seen - height, height, seen))


def select_tiles(queries: mx.array, weights: mx.array, keys: mx.array, k: int) -> list[Tile]:
    """Select k keys for each row; the rows are the last ones of the keys.

    queries [n, heads, D], weights [n, heads], keys [T, D]. Masks, or positions where so few rows are asked
    for that gathering is cheaper.
    """
    rows, heads, _ = queries.shape
    tiles = []
    for start, stop, seen in cut_tiles(rows, keys.shape[0], heads):
        chosen = causal_mask(seen - (stop - start), stop - start, seen)
        if seen > k:
            scores = index_scores(queries[start:stop], weights[start:stop], keys[:seen])
            chosen = select(scores, chosen, k)
        is_gathered = rows <= _GATHER_ROWS
        tiles.append(Tile(start, stop, seen, selected_positions(chosen, k) if is_gathered else chosen))
    return tiles
