"""Multi-head latent attention over the keys that the indexer selected. Called by the decoder block.

Always in absorbed form: queries are moved into the latent space (`embed_q`), attend to the cached latents
themselves, and the result is moved out again (`unembed_out`). One form for prefill and decode means one
set of numbers. Memory is bounded by tiles of queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from models.args import FULL, ModelArgs
from models.arithmetic import Arithmetic
from models.attention.cache import RowCache, SequenceCache
from models.attention.indexer import Indexer
from models.attention.rope import Rope
from models.attention.tiles import EAGER_ROWS, Tile, causal_tiles, gathered_rows, select_tiles, tile_rows
from models.in_flight import InFlight
from models.linear import Linear

if TYPE_CHECKING:
    from models.cuda.fused_attention import FusedAttention

# Rows of a prompt that go through one layer's attention together; `num_heads` latent queries for each are
# the widest thing there: 74 KB a row in GLM-5.2's bfloat16.
PART_ROWS = 2048


@dataclass(frozen=True)
class Span:
    """Rows start to stop of a flat batch: the next tokens of the sequence that owns `cache`.

    A sequence that begins with the first `num_shared` tokens of `origin`'s adopts their rows layer by layer,
    as far as it has not got them: they may come from a span before this one, in the same forward.
    """

    cache: SequenceCache
    start: int
    stop: int
    origin: SequenceCache | None = None
    num_shared: int = 0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def position(self) -> int:
        """Tokens before its first row, while a forward begins; of whole spans."""
        return max(self.cache.length, self.num_shared)

    def append(self, kind: Callable[[SequenceCache], RowCache], rows: mx.array) -> mx.array:
        """Add its part of a forward's rows of one kind to the cache; returns all that this holds."""
        held = kind(self.cache)
        if self.origin:
            held.adopt(kind(self.origin), self.num_shared)
        return held.append(self.cut(rows))

    def cut(self, rows: mx.array) -> mx.array:
        """Its part of a forward's rows."""
        return rows if self.rows == rows.shape[0] else rows[self.start : self.stop]


@dataclass
class RowPart:
    """Rows of one forward that attend together: positions, and what full layers hand to shared ones.

    `rows`: which of the forward's; the spans count from the first of them. `selected[i]` belongs to
    spans[i]; None while every earlier key may be seen. It lives for one forward.
    """

    rows: slice
    spans: Sequence[Span]
    positions: mx.array  # int32 [n]
    selected: list[list[Tile] | None] = field(default_factory=list)

    @property
    def is_large(self) -> bool:
        """Whether its work is evaluated piece by piece: more rows than a decode batch of agents."""
        return self.rows.stop - self.rows.start > EAGER_ROWS


def make_parts(spans: Sequence[Span], num_rows: int = PART_ROWS, grain: int = 1) -> list[RowPart]:
    """The rows of all spans in order, cut into parts of at most `num_rows`.

    A span is cut behind a multiple of `grain` tokens of its sequence.
    """
    total = max(span.stop for span in spans)
    parts, start = [], 0
    while start < total:
        stop = min(start + num_rows, total)
        stop = next((_cut(span, start, stop, grain) for span in spans if span.start < stop < span.stop), stop)
        parts.append(_make_part(spans, start, stop))
        start = stop
    return parts


def _cut(span: Span, start: int, stop: int, grain: int) -> int:
    """The last row up to `stop` before which a span may be cut; `stop` if none lies behind `start`."""
    back = (span.position + stop - span.start) % grain
    last = max(stop - back, span.start)
    return last if last > start else stop


def _make_part(spans: Sequence[Span], start: int, stop: int) -> RowPart:
    cut, positions = [], []
    for span in spans:
        first, last = max(span.start, start), min(span.stop, stop)
        if first < last:
            cut.append(replace(span, start=first - start, stop=last - start))
            before = span.position - span.start
            positions.append(mx.arange(before + first, before + last))
    return RowPart(slice(start, stop), cut, mx.concatenate(positions).astype(mx.int32))


class Attention(nn.Module):
    """One layer's attention, with its own indexer (full layer) or without (shared layer)."""

    def __init__(self, args: ModelArgs, layer: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._args, self._layer = args, layer
        self._arithmetic = arithmetic
        heads = args.num_attention_heads
        self.q_a_proj = Linear(args.hidden_size, args.q_lora_rank, arithmetic)
        self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.inner_norm_eps)
        self.q_b_proj = Linear(args.q_lora_rank, heads * args.qk_head_dim, arithmetic)
        self.kv_a_proj_with_mqa = Linear(args.hidden_size, args.latent_dim, arithmetic)
        self.kv_a_layernorm = nn.RMSNorm(args.kv_lora_rank, eps=args.inner_norm_eps)
        self.embed_q = Linear(args.qk_nope_head_dim, args.kv_lora_rank, arithmetic, num_heads=heads)
        self.unembed_out = Linear(args.kv_lora_rank, args.v_head_dim, arithmetic, num_heads=heads)
        self.o_proj = Linear(heads * args.v_head_dim, args.hidden_size, arithmetic)
        if args.indexer_types[layer] == FULL:
            self.indexer = self._make_indexer()
        self._rope = Rope(args.qk_rope_head_dim, args.rope_theta)

    def _make_indexer(self) -> Indexer:
        return Indexer(self._args, self._arithmetic)

    @property
    def periods(self) -> mx.array:
        """Of the pairs that are rotated, float32."""
        return self._rope.periods

    def __call__(self, x: mx.array, part: RowPart, onto: mx.array) -> mx.array:
        """What x [N, H] attends to, on top of `onto`, [N, H]; appends rows to the caches of the spans."""
        if self._arithmetic.fuses(x.shape[0]) and self._fused is not None:
            return self._in_few_kernels(self._fused, x, part, onto)
        return onto + self.attended(x, part)

    def attended(self, x: mx.array, part: RowPart) -> mx.array:
        """What x [N, H] attends to, [N, H]; appends rows to the caches of the spans."""
        is_compiled = self._arithmetic.compiles and not part.is_large
        project, finish = self._compiled if is_compiled else (self._project, self._finish)
        q_residual, queries, rows, *new_keys = project(x, part.positions)
        keys = [span.append(lambda cache: cache.latents[self._layer], rows) for span in part.spans]
        in_flight = InFlight(self._arithmetic.pieces_in_flight) if part.is_large else None
        if "indexer" in self:
            self._update_selection(x, q_residual, new_keys[0], part, in_flight)
        outs = [
            self._attend(queries[:, span.start : span.stop], span_keys, selected, in_flight)
            for span, span_keys, selected in zip(part.spans, keys, part.selected, strict=True)
        ]
        return finish(mx.concatenate(outs, axis=1))

    @cached_property
    def _fused(self) -> "FusedAttention | None":
        return self._arithmetic.fused_attention(self, self._args.index_topk, self._args.qk_head_dim**-0.5)

    def _in_few_kernels(
        self, fused: "FusedAttention", x: mx.array, part: RowPart, onto: mx.array
    ) -> mx.array:
        """As `__call__`, for few rows."""
        queries, rows, *index = fused.project(x, part.positions)
        if index:
            part.selected = [None] * len(part.spans)
        outs = []
        for i, span in enumerate(part.spans):
            span.append(lambda cache: cache.latents[self._layer], rows)
            q, positions, *asked = (span.cut(array) for array in (queries, part.positions, *index[1:]))
            if index:
                span.append(lambda cache: cache.index_keys[self._layer], index[0])
                keys = span.cache.index_keys[self._layer]
                if keys.length > self._args.index_topk:
                    chosen = fused.select(*asked, keys.state, positions)
                    part.selected[i] = [Tile(0, span.rows, keys.length, chosen)]
            tiles = part.selected[i]
            latents = span.cache.latents[self._layer].state
            arrays = [q, latents, positions] + ([tiles[0].keys] if tiles else [])
            outs.append(fused.attend(*arrays))
        return fused.finish(outs[0] if len(outs) == 1 else mx.concatenate(outs), onto)

    @cached_property
    def _compiled(self) -> tuple[Callable[..., list[mx.array]], Callable[..., mx.array]]:
        """What comes before the cache is used, and after, for few rows."""
        return mx.compile(self._project), mx.compile(self._finish)

    def _project(self, x: mx.array, positions: mx.array) -> list[mx.array]:
        """What rows x [N, H] bring: the query residual, latent queries [heads, N, latent], rows of the cache
        [N, latent] and, in a full layer, index keys [N, D]."""
        q_residual = self.q_a_layernorm(self.q_a_proj(x))
        made = [q_residual, self._latent_queries(q_residual, positions), self._latent_rows(x, positions)]
        return [*made, self.indexer.key_rows(x, positions)] if "indexer" in self else made

    def _finish(self, out: mx.array) -> mx.array:
        """What was attended to, out of the latent space: [heads, N, kv_lora] -> [N, H]."""
        values = self.unembed_out(out)  # [heads, N, v]
        return self.o_proj(values.transpose(1, 0, 2).reshape(out.shape[1], -1))

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

    def _update_selection(
        self,
        x: mx.array,
        q_residual: mx.array,
        new_keys: mx.array,
        part: RowPart,
        in_flight: InFlight | None,
    ) -> None:
        """Write the index keys of all spans, then score where there are more keys than may be selected."""
        keys = [self._add_keys(span, new_keys) for span in part.spans]
        part.selected = [None] * len(part.spans)
        if all(of_span.shape[0] <= self._most_selected for of_span in keys):
            return
        queries = self.indexer.query_rows(q_residual, part.positions)
        weights = self.indexer.head_weights(x)
        for i, (span, of_span) in enumerate(zip(part.spans, keys, strict=True)):
            if of_span.shape[0] > self._most_selected:
                asked = span.cut(queries), span.cut(weights)
                part.selected[i] = self._select(span, *asked, of_span, in_flight)

    @property
    def _most_selected(self) -> int:
        """As many index keys as a row selects; where there are no more all are seen."""
        return self._args.index_topk

    def _add_keys(self, span: Span, new_keys: mx.array) -> mx.array:
        """Appends a span's index keys, out of the forward's rows [N, D]; returns all that it has, [T, D]."""
        return span.append(lambda cache: cache.index_keys[self._layer], new_keys)

    def _select(
        self,
        span: Span,
        queries: mx.array,
        weights: mx.array,
        keys: mx.array,
        in_flight: InFlight | None,
    ) -> list[Tile]:
        """Scores the queries of a span against its index keys, and selects."""
        return select_tiles(
            queries, weights, keys, self._args.index_topk,
            heads=self._args.num_attention_heads, arithmetic=self._arithmetic, in_flight=in_flight,
        )  # fmt: skip

    def _attend(
        self, queries: mx.array, keys: mx.array, selected: list[Tile] | None, in_flight: InFlight | None
    ) -> mx.array:
        """queries [heads, n, latent], keys [T, latent] -> [heads, n, kv_lora]."""
        heads, rows, _ = queries.shape
        height = tile_rows(heads * keys.shape[0], self._arithmetic.tile_elements)
        outs = []
        for tile in causal_tiles(rows, keys.shape[0], height) if selected is None else selected:
            q, seen = queries[:, tile.start : tile.stop], keys[: tile.num_keys]
            if tile.keys is None or tile.keys.dtype == mx.bool_:
                outs.append(self._attend_masked(q, seen, tile.keys))
                if in_flight:
                    in_flight.launch(outs[-1])
            else:
                outs += self._attend_gathered(q, seen, tile.keys, in_flight)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def _attend_masked(self, q: mx.array, keys: mx.array, visible: mx.array | None) -> mx.array:
        """All keys, those not visible [n, T] at -inf."""
        values = keys[:, : self._args.kv_lora_rank]
        return self._arithmetic.attended(q * self._args.qk_head_dim**-0.5, keys, values, visible)

    def _attend_gathered(
        self, q: mx.array, keys: mx.array, positions: mx.array, in_flight: InFlight | None
    ) -> list[mx.array]:
        """Only the selected keys, positions [n, k]; a position of T stands for nothing. In pieces."""
        rows, k = positions.shape
        height = gathered_rows(k * keys.shape[1], self._arithmetic.tile_elements)
        outs = []
        for first in range(0, rows, height):
            piece = slice(first, first + height)
            outs.append(self._gathered(q[:, piece], keys, positions[piece]))
            if in_flight:
                in_flight.launch(outs[-1])
        return outs

    def _gathered(self, q: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
        num_keys = keys.shape[0]
        chosen = keys[mx.minimum(positions, num_keys - 1)]  # [n, k, latent]
        q = q.swapaxes(0, 1) * self._args.qk_head_dim**-0.5  # [n, heads, latent]
        is_key = (positions < num_keys)[:, None, :]
        # The rotary part is multiplied too and cut off: to cut it off the keys would copy them.
        out = self._arithmetic.attended(q, chosen, chosen, is_key)  # [n, heads, latent]
        return out[..., : self._args.kv_lora_rank].swapaxes(0, 1)
