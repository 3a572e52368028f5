"""Draws the next token of one sequence. Pure functions over MLX arrays; called by the engine's loop.

Order, each stage on the result of the one before:

    1. logit_bias is added
    2. repetition penalty (tokens of prompt and answer), then presence and frequency (answer only)
    3. temperature; 0, or next to it, takes the likeliest token and ends here
    4. top_k, then top_p, then min_p, each over what is left, renormalised
    5. the draw, with a key of the request's own, split once per token

Log-probabilities that are reported are those of the model, before any of this.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from server.link.messages import Sampling, TokenScore

NEVER = -float("inf")
# Below it only the likeliest token could be drawn, but divided by it logits come to lie beyond all floats.
COLDEST = 1e-6


@dataclass(frozen=True)
class SamplerState:
    """What sampling remembers of a sequence between tokens.

    `seen` [V] marks tokens of prompt and answer, `counts` [V] counts those of the answer. Both are None
    where no penalty asks for them.
    """

    key: mx.array
    seen: mx.array | None
    counts: mx.array | None


def start_sampling(sampling: Sampling, prompt: Iterable[int], vocab_size: int) -> SamplerState:
    """The state before the first token."""
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
    seen = counts = None
    if sampling.repetition_penalty != 1:
        marks = np.zeros(vocab_size, dtype=np.bool_)
        marks[list(prompt)] = True
        seen = mx.array(marks)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = mx.zeros(vocab_size)
    return SamplerState(mx.random.key(seed), seen, counts)


def draw(
    logits: mx.array, sampling: Sampling, state: SamplerState
) -> tuple[mx.array, SamplerState]:  # [V] -> []
    """The next token and the state after it. Lazy: nothing is evaluated here."""
    logits = apply_penalties(apply_bias(logits, sampling.logit_bias), sampling, state)
    if sampling.temperature < COLDEST:
        token, key = mx.argmax(logits), state.key  # keys that nobody draws with are never evaluated
    else:
        key, draw_key = mx.random.split(state.key)
        scaled = filter_logits(logits / sampling.temperature, sampling)
        token = mx.random.categorical(scaled, key=draw_key)
    return token, _remember(token, key, state)


def _remember(token: mx.array, key: mx.array, state: SamplerState) -> SamplerState:
    here = token[None]
    seen = None if state.seen is None else state.seen.at[here].maximum(mx.array(True))
    counts = None if state.counts is None else state.counts.at[here].add(1.0)
    return SamplerState(key, seen, counts)


def apply_bias(logits: mx.array, bias: tuple[tuple[int, float], ...]) -> mx.array:
    """Add to the logits of some tokens."""
    if not bias:
        return logits
    ids = mx.array([token_id for token_id, _ in bias])
    return logits.at[ids].add(mx.array([amount for _, amount in bias]))


def apply_penalties(logits: mx.array, sampling: Sampling, state: SamplerState) -> mx.array:
    """Make tokens that occurred less likely (or, below the neutral value, more)."""
    if state.seen is not None:
        penalty = sampling.repetition_penalty
        logits = mx.where(state.seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if state.counts is not None:
        logits = logits - sampling.frequency_penalty * state.counts
        logits = logits - sampling.presence_penalty * (state.counts > 0)
    return logits


def filter_logits(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set the logits of tokens that may not be drawn to minus infinity. The likeliest always stays."""
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def keep_top_k(logits: mx.array, top_k: int) -> mx.array:
    """Keep the k likeliest tokens, and those tied with the last of them."""
    threshold = mx.min(mx.topk(logits, top_k))
    return mx.where(logits < threshold, NEVER, logits)


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p."""
    order = mx.argsort(-logits)
    probs = mx.softmax(logits[order], precise=True)
    mass_before = mx.cumsum(probs) - probs
    is_first = mx.arange(order.size) == 0
    allowed = mx.put_along_axis(
        mx.zeros(order.size, dtype=mx.bool_), order, is_first | (mass_before < top_p), 0
    )
    return mx.where(allowed, logits, NEVER)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Keep tokens that are at least min_p times as likely as the likeliest."""
    return mx.where(logits < mx.max(logits) + float(np.log(min_p)), NEVER, logits)


def score_tokens(logits: mx.array, tokens: mx.array, num_top: int) -> list[TokenScore]:  # [M, V], [M]
    """Log-probabilities of `tokens` and of the `num_top` likeliest, one entry per row. Evaluates."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top_ids, top = _likeliest(logprobs, min(num_top, logits.shape[-1]))
    mx.eval(tokens, chosen, top_ids, top)
    rows: list[tuple[int, float, list[int], list[float]]]
    rows = list(zip(*(array.tolist() for array in (tokens, chosen, top_ids, top)), strict=True))
    return [
        TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in rows
    ]


def _likeliest(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:  # [M, V] -> [M, count] twice
    if count == 0:
        empty = mx.zeros((logprobs.shape[0], 0))
        return empty, empty
    ids = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
