"""Grammars that bind an answer, computed by llguidance: which tokens may come next.

`Grammars` belongs to the engine's loop and makes a `Matcher` for each sequence that has a grammar. Both that
and the masks are computed on threads beside the model's forward pass (llguidance releases the lock). Masks
are collected when the logits are there; a sequence whose matcher is not made yet waits in line.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import llguidance.numpy
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from config.errors import EngineError, RequestError
from server.glm.tokenizer_file import read_tokenizer_file

NEVER = -float("inf")

Mask = NDArray[np.bool_]


class Grammars:
    """Makes matchers over one vocabulary, which is read when the first grammar comes."""

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        self._checkpoint = checkpoint
        self._vocab_size = vocab_size
        self._by_stops: dict[frozenset[int], LLTokenizer] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # Of its own: a schema of 10,000 properties takes 12 s, and others wait for masks meanwhile.
        self._making = ThreadPoolExecutor(1, thread_name_prefix="grammar-making")

    def begin_matcher(self, grammar: str, stop_token_ids: frozenset[int]) -> "Future[Matcher]":
        """The same as `make_matcher`, later."""
        return self._making.submit(self.make_matcher, grammar, stop_token_ids)

    def make_matcher(self, grammar: str, stop_token_ids: frozenset[int]) -> "Matcher":
        """A matcher at the start of a grammar, after which one of the stop tokens must come."""
        if stop_token_ids not in self._by_stops:
            self._by_stops[stop_token_ids] = self._read(stop_token_ids)
        inner = LLMatcher(self._by_stops[stop_token_ids], grammar, log_level=0)
        if inner.is_error():
            raise RequestError(f"the grammar cannot be followed: {_reason(inner)}")
        return Matcher(inner, self._vocab_size, stop_token_ids, self._threads)

    def _read(self, stop_token_ids: frozenset[int]) -> LLTokenizer:
        text = read_tokenizer_file(self._checkpoint)
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=sorted(stop_token_ids))


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(
        self, inner: LLMatcher, vocab_size: int, stop_token_ids: frozenset[int], threads: ThreadPoolExecutor
    ) -> None:
        self._inner = inner
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self._threads = threads
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._mask: Future[Mask] | None = None

    def start(self) -> None:
        """Begin to compute what the first token may be."""
        self._mask = self._threads.submit(self._compute)

    def apply(self, logits: mx.array) -> mx.array:  # [V]
        """The logits, minus infinity where the grammar does not allow a token."""
        assert self._mask, "a matcher is started before it is asked"
        return mx.where(mx.array(self._mask.result()), logits, NEVER)

    def accept(self, token_id: int) -> None:
        """Go on past this token, and begin to compute what may follow."""
        if token_id not in self._stop_token_ids:
            self._mask = self._threads.submit(self._advance, token_id)

    def _advance(self, token_id: int) -> Mask:
        if not self._bits[0, token_id // 32] >> token_id % 32 & 1:
            raise EngineError(f"token {token_id} was drawn, which the grammar does not allow")
        self._inner.consume_token(token_id)
        return self._compute()

    def _compute(self) -> Mask:
        """Some grammars prove to be too large only here. The mask would then be that of a complete answer."""
        llguidance.numpy.fill_next_token_bitmask(self._inner, self._bits)
        if self._inner.is_error():
            message = "the grammar is too complex to follow the answer any further"
            raise RequestError(f"{message}: {_reason(self._inner)}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(np.bool_)


def _reason(inner: LLMatcher) -> str:
    """What llguidance says, without the state and the trace that it puts below."""
    return str(inner.get_error()).partition("\n")[0][:300]
