"""GLM-5 to GLM-5.3 (`glm_moe_dsa`) in MLX: blocks and the flat forward. Called by the engine.

A forward takes the rows of several sequences at once, ragged, without padding. It knows no threads and no
files; experts come through an `ExpertStore`.
"""

from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.attention.attention import Attention, RowPart, Span, make_parts
from models.attention.cache import SequenceCache
from models.attention.tiles import EAGER_ROWS
from models.experts.experts import Experts, run_through
from models.experts.router import Router
from models.in_flight import InFlight
from models.linear import Linear
from streaming.eviction.policy import OBSERVED_ROWS

# A prompt that uses each expert so many times in the mean wants nearly every one.
SURE_USES = 8


class DenseMlp(nn.Module):
    """silu(gate x) * up x, then down: the leading dense layers and the shared experts."""

    def __init__(self, hidden: int, intermediate: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._arithmetic = arithmetic
        self.gate_proj = Linear(hidden, intermediate, arithmetic)
        self.up_proj = Linear(hidden, intermediate, arithmetic)
        self.down_proj = Linear(intermediate, hidden, arithmetic)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._arithmetic.gated_product(x, self.gate_proj, self.up_proj))


class MoeMlp(nn.Module):
    """Routed experts plus the shared ones, which are added unscaled."""

    def __init__(self, args: ModelArgs, arithmetic: Arithmetic, experts: Experts) -> None:
        super().__init__()
        self.gate = Router(args, arithmetic)
        self._experts = experts
        self._top_k, self._num_experts = args.num_experts_per_tok, args.n_routed_experts
        if args.n_shared_experts:
            width = args.moe_intermediate_size * args.n_shared_experts
            self.shared_experts = DenseMlp(args.hidden_size, width, arithmetic)
        self._compiles, self._pieces_in_flight = arithmetic.compiles, arithmetic.pieces_in_flight

    def __call__(self, x: mx.array, onto: list[mx.array], guess: mx.array | None = None) -> mx.array:
        """What x [N, H] comes to, on top of `onto`, [N, H] each.

        `guess`: the next layer's experts, as `Router.ranked` gives them.
        """
        compiles = self._compiles and x.shape[0] <= EAGER_ROWS
        if self.is_resident_for(x.shape[0]):
            return self._compiled(x, onto) if compiles else self.whole(x, onto)
        (ids, weights, choice), added = (self._compiled_begin if compiles else self._begin)(x)
        return self._experts(x, ids, weights, choice, guess=guess, added=(*added, *onto))

    @cached_property
    def _compiled(self) -> Callable[..., mx.array]:
        return mx.compile(self.whole)

    @cached_property
    def _compiled_begin(self) -> Callable[..., Any]:
        return mx.compile(self._begin)

    def is_resident_for(self, rows: int) -> bool:
        """Whether a call for so many rows depends on its arrays alone."""
        return self._experts.are_resident_for(rows)

    def whole(self, x: mx.array, onto: list[mx.array]) -> mx.array:
        """The MLP's output added to `onto`, where experts are resident: a pure function."""
        routing, added = self._begin(x)
        return self._experts(x, *routing, added=(*added, *onto))

    def _begin(self, x: mx.array) -> tuple[tuple[mx.array, mx.array, mx.array], list[mx.array]]:
        """The routing, as `Router` gives it, and what is added to the routed experts' outputs."""
        return self.gate(x), [self.shared_experts(x)] if "shared_experts" in self else []

    def sweep(
        self,
        pieces: list[mx.array],
        norm: nn.RMSNorm | None,
        parts: Sequence[RowPart],
    ) -> Generator[None, None, None]:
        """Adds what it makes of norm(x) to x, for many rows, with pauses; `pieces` are x by parts, [n, H].

        Without a norm, x is normed already, and what is made takes its place. As long as the prompt are x,
        twice at the end, the experts' sum, and ids and weights of the routing. All else is made part by part.
        """
        normed = norm or (lambda rows: rows)
        ids, weights, choice = self._route(pieces, normed)
        x = joined(pieces)
        pieces.clear()  # or x would lie in memory twice while experts are read
        routed = yield from self._experts.sweep(lambda rows: normed(x[rows]), ids, weights, choice)
        for part in parts:
            rows = x[part.rows]
            added = routed[part.rows].astype(x.dtype)
            if "shared_experts" in self:
                added = added + self.shared_experts(normed(rows))
            pieces.append(rows + added if norm else added)
            mx.eval(pieces[-1])

    def _route(
        self, pieces: Sequence[mx.array], norm: Callable[[mx.array], mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Ids and weights of all rows, and by what they were chosen, of the last ones that are observed."""
        in_flight = InFlight(self._pieces_in_flight)
        routing = []
        num_unobserved = sum(piece.shape[0] for piece in pieces) - OBSERVED_ROWS
        for piece in pieces:
            ids, weights, choice = self.gate(norm(piece))
            routing.append((ids, weights, choice[max(0, min(num_unobserved, piece.shape[0])) :]))
            in_flight.launch(*routing[-1])
            num_unobserved -= piece.shape[0]
        ids, weights, choice = (joined(list(column)) for column in zip(*routing, strict=True))
        mx.eval(ids, weights, choice)
        return ids, weights, choice

    def anticipate_sweep(self, rows: int) -> None:
        """Starts to read this layer's experts, where so many rows are sure to want nearly all."""
        num_pairs = rows * self._top_k
        if num_pairs >= SURE_USES * self._num_experts and not self._experts.are_small_for(num_pairs):
            self._experts.anticipate_sweep()

    def settle(self) -> None:
        self._experts.settle()

    def precede(self, following: "MoeMlp") -> None:
        self._experts.precede(following._experts)

    def wants_guess(self, rows: int) -> bool:
        return self._experts.wants_guess(rows, self._top_k)

    def anticipate(self, guess: Callable[[], mx.array], rows: int) -> None:
        """Starts to read this layer's experts, where a guess at them is worth its synchronisation."""
        if self._experts.can_be_guessed(rows, self._top_k):
            self._experts.anticipate(guess())


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, args: ModelArgs, layer: int, arithmetic: Arithmetic, experts: Experts | None) -> None:
        super().__init__()
        self.self_attn = self._make_attention(args, layer, arithmetic)
        self.mlp = (
            MoeMlp(args, arithmetic, experts)
            if experts is not None
            else DenseMlp(args.hidden_size, args.intermediate_size, arithmetic)
        )
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._guess_next: Callable[[mx.array], mx.array] | None = None
        self._first_sparse: Callable[[], MoeMlp] | None = None

    def _make_attention(self, args: Any, layer: int, arithmetic: Arithmetic) -> Any:
        return Attention(args, layer, arithmetic)

    def mlp_input(self, h: mx.array) -> mx.array:
        """What the MLP sees of the residual state, [N, H]."""
        return self.post_attention_layernorm(h)

    def precede(self, following: "DecoderLayer") -> None:
        """Guess the next layer's experts: its own norm and router on this layer's residual state."""
        if not isinstance(sparse := following.mlp, MoeMlp):
            return
        router, mlp_input = sparse.gate, following.mlp_input
        self._guess_next = lambda h: router.ranked(mlp_input(h))
        if isinstance(self.mlp, MoeMlp):
            self.mlp.precede(sparse)
        else:
            self._first_sparse = lambda: sparse  # not its module's child

    def __call__(self, x: mx.array, parts: Sequence[RowPart]) -> mx.array:
        """x [N, H] -> [N, H], of few rows."""
        [part] = parts
        h = self._attended(x, part)
        return self._through_mlp(h, self.mlp_input(h), [h])

    def _through_mlp(self, h: mx.array, normed: mx.array, onto: list[mx.array]) -> mx.array:
        """The MLP's output for its input [N, H], on top of `onto`; by h the next experts are guessed."""
        guess = self._guess_next
        if isinstance(self.mlp, MoeMlp) and guess and self.mlp.wants_guess(h.shape[0]):
            return self.mlp(normed, onto, guess(h))
        if self._first_sparse and guess:
            self._first_sparse().anticipate(lambda: guess(h), h.shape[0])
        return self.mlp(normed, onto) if isinstance(self.mlp, MoeMlp) else sum(onto, self.mlp(normed))

    def piece_by_piece(self, pieces: list[mx.array], parts: Sequence[RowPart]) -> Generator[None, None, None]:
        """The same for many rows, a list of parts [n, H] that are replaced; pauses when nothing is pending.

        None is written into: MLX copies all of an array that anything else still holds, as a command buffer
        of Metal's may.
        """
        for i, part in enumerate(parts):
            pieces[i] = self._attended(pieces[i], part)
            mx.eval(pieces[i])
            yield
        if isinstance(self.mlp, MoeMlp):
            yield from self.mlp.sweep(pieces, self.post_attention_layernorm, parts)
            return
        for i, rows in enumerate(pieces):
            pieces[i] = rows + self.mlp(self.post_attention_layernorm(rows))
            mx.eval(pieces[i])
            yield

    def _attended(self, x: mx.array, part: RowPart) -> mx.array:
        return self.self_attn(self.input_layernorm(x), part, x)


def joined(pieces: Sequence[mx.array]) -> mx.array:
    """Arrays [n, ...] one behind the other; a single one itself."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces))


class Trunk(nn.Module):
    """Everything under the checkpoint's prefix `model.`: embedding, layers, last norm."""

    def __init__(
        self,
        args: ModelArgs,
        arithmetic: Arithmetic,
        make_experts: Callable[[int], Experts],
        make_layer: Callable[..., DecoderLayer],
    ) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            make_layer(args, i, arithmetic, make_experts(i) if i in args.moe_layers else None)
            for i in range(args.num_hidden_layers)
        ]
        for layer, following in pairwise(self.layers):
            layer.precede(following)
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class Model(nn.Module):
    """The language model. Its parameters carry the checkpoint's names; experts are not among them."""

    def __init__(
        self,
        args: ModelArgs,
        arithmetic: Arithmetic,
        make_experts: Callable[[int], Experts],
        make_layer: Callable[..., DecoderLayer] = DecoderLayer,
    ) -> None:
        super().__init__()
        self.args, self.arithmetic = args, arithmetic
        self.model = Trunk(args, arithmetic, make_experts, make_layer)
        self.lm_head = Linear(args.hidden_size, args.vocab_size, arithmetic)
        self._caches: WeakSet[SequenceCache] = WeakSet()

    def make_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        cache = self._empty_cache()
        self._caches.add(cache)
        return cache

    def _empty_cache(self) -> SequenceCache:
        return SequenceCache(self.args, self.arithmetic.dtype)

    @property
    def num_layers(self) -> int:
        return self.args.num_hidden_layers

    @property
    def cache_bytes(self) -> int:
        """Of all caches that are still somebody's."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def _first_sparse(self) -> MoeMlp | None:
        """The disk would have nothing to do until its routing is known, after all dense layers."""
        return next((layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoeMlp)), None)

    def settle(self) -> None:
        """Evaluates whatever may still read a slot of a bank, of passes that are under way or given up."""
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoeMlp):
                layer.mlp.settle()

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        """One pass over all layers, pausing after each; the value returned is the hidden state [N, H].

        tokens int32 [N]; the spans cover the rows without gaps and own different caches; a span's origin, if
        one of them owns it, stands before it. A pass over many rows pauses amid its layers too, with None,
        where a group of experts or a part of the rows is done.
        At each of its pauses all work so far is evaluated, so nothing pending refers to a bank and the
        graph stays small; a pass over few rows stays lazy until somebody reads its result. Amid a layer
        other passes over few rows may run, but not over many: they would take over the experts on their way.
        """
        parts = self._begin(spans)
        for span in spans:
            span.cache.expect(span.position + span.rows - span.cache.length)
        if tokens.shape[0] > EAGER_ROWS and (sparse := self._first_sparse) is not None:
            sparse.anticipate_sweep(tokens.shape[0])
        pieces = [self._embed(tokens[part.rows]) for part in parts]
        for i, layer in enumerate(self.model.layers):
            if tokens.shape[0] <= EAGER_ROWS:
                [x] = pieces
                pieces = [layer(x, parts)]
                self.arithmetic.launch(*pieces)
            else:
                yield from layer.piece_by_piece(pieces, parts)
                mx.eval(*pieces, *(state for span in spans for state in span.cache.states(i)))
            yield i
        return joined([self._last_norm(piece) for piece in pieces])

    def _begin(self, spans: Sequence[Span]) -> list[RowPart]:
        """The rows of a forward, cut into parts."""
        return make_parts(spans)

    def _last_norm(self, x: mx.array) -> mx.array:
        """The hidden state after the last norm, [N, H]."""
        return self.model.norm(x)

    def _embed(self, tokens: mx.array) -> mx.array:
        """tokens int32 [n] -> [n, H]."""
        return self.model.embed_tokens(tokens).astype(self.arithmetic.dtype)

    def __call__(self, tokens: mx.array, spans: Sequence[Span]) -> mx.array:
        """The hidden state [N, H] after all layers and the last norm, without pauses."""
        return run_through(self.forward(tokens, spans))

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [M, H] -> float32 [M, vocab]."""
        return self.lm_head(hidden).astype(mx.float32)
