"""GLM-5.3-Flash's language model (`glm5_next`): blocks between mixed streams, and the flat forward.

Each row of a forward is as wide as all its residual streams together, [N, S H]; a block sees one stream made
of them.
"""

from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any, cast

import mlx.core as mx

from models.arithmetic import Arithmetic
from models.attention.attention import Attention, RowPart, Span, make_parts
from models.attention.cache import SequenceCache
from models.experts.experts import Experts
from models.glm5_next.delta_attention import DeltaAttention
from models.glm5_next.flash_args import LINEAR, FlashArgs
from models.glm5_next.flash_cache import FlashCache, State
from models.glm5_next.hyper_connection import HyperConnection, Mix
from models.glm5_next.pooled_attention import PooledAttention
from models.glm_moe_dsa import DecoderLayer, Model, MoeMlp


class FlashLayer(DecoderLayer):
    """Attention and MLP, each behind a norm and between streams that are mixed anew."""

    def __init__(self, args: FlashArgs, layer: int, arithmetic: Arithmetic, experts: Experts | None) -> None:
        self._compiles = arithmetic.compiles
        super().__init__(args, layer, arithmetic, experts)
        self.attn_hc = HyperConnection(args, arithmetic)
        self.ffn_hc = HyperConnection(args, arithmetic)

    def _make_attention(
        self, args: FlashArgs, layer: int, arithmetic: Arithmetic
    ) -> Attention | DeltaAttention:
        kind = DeltaAttention if args.layer_types[layer] == LINEAR else PooledAttention
        return kind(args, layer, arithmetic)

    def mlp_input(self, h: mx.array) -> mx.array:
        """What the MLP sees of the streams, [N, S H] -> [N, H]."""
        return self._between(h)[0]

    def __call__(self, x: mx.array, parts: Sequence[RowPart]) -> mx.array:
        """x [N, S H] -> [N, S H], of few rows."""
        [part] = parts
        if isinstance(self.self_attn, DeltaAttention) and self.self_attn.steps(x, part):
            return self._step(self.self_attn, x, part)
        before, join_attention, between, join_mlp = self._compiled if self._compiles else self._pieces
        normed, mix = before(x)
        h = join_attention(x, self.self_attn.attended(normed, part), mix)
        normed, mix = between(h)
        return join_mlp(h, self._through_mlp(h, normed, []), mix)

    def _step(self, attention: DeltaAttention, x: mx.array, part: RowPart) -> mx.array:
        """A row of each sequence through a linear layer: in one piece, or two where experts are streamed."""
        whole, until_mlp = self._compiled_step
        if isinstance(self.mlp, MoeMlp) and self.mlp.is_resident_for(x.shape[0]):
            out, states = whole(x, attention.states(part))
            attention.keep(part, states)
            return cast(mx.array, out)
        h, normed, mix, states = until_mlp(x, attention.states(part))
        attention.keep(part, states)
        return cast(mx.array, self._compiled[-1](h, self._through_mlp(h, normed, []), mix))

    @cached_property
    def _compiled_step(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """A linear layer's step as a whole, and up to its MLP."""
        return mx.compile(self._whole_step), mx.compile(self._step_until_mlp)

    def _whole_step(self, x: mx.array, states: list[State]) -> tuple[mx.array, list[State]]:
        h, normed, mix, states = self._step_until_mlp(x, states)
        return self.ffn_hc.join(h, self.mlp.whole(normed, []), mix), states

    def _step_until_mlp(
        self, x: mx.array, states: list[State]
    ) -> tuple[mx.array, mx.array, Mix, list[State]]:
        normed, mix = self._before(x)
        out, states = self.self_attn.step(normed, states)
        h = self.attn_hc.join(x, out, mix)
        return h, *self._between(h), states

    @property
    def _pieces(self) -> tuple[Callable[..., Any], ...]:
        """What stands around attention and MLP, in order."""
        return self._before, self.attn_hc.join, self._between, self.ffn_hc.join

    @cached_property
    def _compiled(self) -> tuple[Callable[..., Any], ...]:
        return tuple(mx.compile(piece) for piece in self._pieces)

    def _before(self, x: mx.array) -> tuple[mx.array, Mix]:
        return self.attn_hc(x, self.input_layernorm)

    def _between(self, h: mx.array) -> tuple[mx.array, Mix]:
        return self.ffn_hc(h, self.post_attention_layernorm)

    def piece_by_piece(self, pieces: list[mx.array], parts: Sequence[RowPart]) -> Generator[None, None, None]:
        """The same for many rows, parts [n, S H] that are replaced; pauses when nothing is pending."""
        for i, part in enumerate(parts):
            pieces[i] = self._attended(pieces[i], part)
            mx.eval(pieces[i])
            yield
        inputs, mixes = [], []
        for piece in pieces:
            normed, mix = self._between(piece)
            mx.eval(normed, *mix)
            inputs.append(normed)
            mixes.append(mix)
        if isinstance(self.mlp, MoeMlp):
            yield from self.mlp.sweep(inputs, None, parts)
        for i, mix in enumerate(mixes):
            out = inputs[i] if isinstance(self.mlp, MoeMlp) else self.mlp(inputs[i])
            pieces[i] = self.ffn_hc.join(pieces[i], out, mix)
            mx.eval(pieces[i])
        yield

    def _attended(self, x: mx.array, part: RowPart) -> mx.array:
        normed, mix = self._before(x)
        return self.attn_hc.join(x, self.self_attn.attended(normed, part), mix)


class FlashModel(Model):
    """The language model. Its parameters carry the checkpoint's names; experts are not among them."""

    args: FlashArgs

    def __init__(
        self, args: FlashArgs, arithmetic: Arithmetic, make_experts: Callable[[int], Experts]
    ) -> None:
        super().__init__(args, arithmetic, make_experts, FlashLayer)

    def _empty_cache(self) -> SequenceCache:
        return FlashCache(self.args, self.arithmetic.dtype)

    def _begin(self, spans: Sequence[Span]) -> list[RowPart]:
        lent: dict[int, list[int]] = {}
        for span in spans:
            if span.origin:
                lent.setdefault(id(span.origin), []).append(span.num_shared)
        for cache in (span.cache for span in spans):
            assert isinstance(cache, FlashCache), "the model made this cache"
            cache.begin(lent.get(id(cache), ()))
        return make_parts(spans, grain=FlashCache.grain)

    def _embed(self, tokens: mx.array) -> mx.array:
        """tokens int32 [n] -> [n, S H]: each stream begins with the embedding."""
        return mx.tile(super()._embed(tokens), (1, self.args.hc_mult))

    def _last_norm(self, x: mx.array) -> mx.array:
        """The norm of the streams' mean, [N, S H] -> [N, H]."""
        streams = x.reshape(x.shape[0], self.args.hc_mult, -1)
        return super()._last_norm(streams.astype(mx.float32).mean(axis=1).astype(x.dtype))
