"""Grammars that bind an answer, computed by llguidance: which tokens may come next.

`Grammars` belongs to the engine's loop and makes a `Matcher` for each sequence that has a grammar. Both that
and the masks are computed on threads beside the model's forward pass (llguidance releases the lock). Masks
are collected when the logits are there; a sequence whose matcher is not made yet waits in line.
"""

import os
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from weakref import WeakValueDictionary, finalize

import llguidance.numpy
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from config.errors import EngineError, RequestError
from config.plan import LARGE_GRAMMARS_BYTES as LARGE_BYTES
from config.plan import SMALL_GRAMMAR_BYTES as SMALL_BYTES
from server.glm.schemas.following import parser_limits, reason_of
from server.glm.tokenizer_file import read_tokenizer_file

NEVER = -float("inf")
# A grammar whose last mask took longer keeps no others waiting for the next one: it sits steps out.
SLOW_MASK_S = 0.02

# Compiled grammars that are kept though no answer follows them.
MAX_LATEST = 32
# Of threads that compile grammars: answers under way come first.
NICENESS = 10

Mask = NDArray[np.bool_]
Name = tuple[str, frozenset[int]]


class Grammars:
    """Makes matchers over one vocabulary, which is read when the first grammar comes.

    Grammars of the same text are compiled once while any answer follows one, or they are among the latest. A
    large one waits until all large ones together fit into their line of the plan.
    """

    def __init__(self, checkpoint: Path, vocab_size: int, limit_bytes: int = LARGE_BYTES) -> None:
        self._checkpoint = checkpoint
        self._vocab_size = vocab_size
        self._limit_bytes = limit_bytes
        self._by_stops: dict[frozenset[int], LLTokenizer] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        # Of their own: masks do not wait for grammars that are compiled, nor small grammars for large ones.
        self._small = ThreadPoolExecutor(1, thread_name_prefix="grammar-small", initializer=_give_way)
        self._large = ThreadPoolExecutor(1, thread_name_prefix="grammar-large", initializer=_give_way)
        self._lock = threading.Lock()
        self._compiled: WeakValueDictionary[Name, _Compiled] = WeakValueDictionary()
        self._latest: OrderedDict[Name, _Compiled] = OrderedDict()
        self._room = threading.Condition()
        self._large_bytes = 0

    def begin_matcher(
        self, grammar: str, stop_token_ids: frozenset[int], num_bytes: int = 0
    ) -> "Future[Matcher]":
        """The same as `make_matcher`, later. `num_bytes`: what the grammar takes compiled."""
        threads = self._small if num_bytes <= SMALL_BYTES else self._large
        return threads.submit(self.make_matcher, grammar, stop_token_ids, num_bytes)

    def make_matcher(self, grammar: str, stop_token_ids: frozenset[int], num_bytes: int = 0) -> "Matcher":
        """A matcher at the start of a grammar, after which one of the stop tokens must come."""
        name = (grammar, stop_token_ids)
        with self._lock:
            compiled = self._compiled.get(name)
        if compiled is None:
            compiled = self._compile(name, num_bytes)
        with self._lock:
            self._compiled[name] = compiled
            self._latest[name] = compiled
            self._latest.move_to_end(name)
        self._forget(0)
        return Matcher(compiled, self._vocab_size, stop_token_ids, self._threads)

    def _compile(self, name: "Name", num_bytes: int) -> "_Compiled":
        grammar, stop_token_ids = name
        with self._lock:
            if stop_token_ids not in self._by_stops:
                self._by_stops[stop_token_ids] = self._read(stop_token_ids)
        is_large = num_bytes > SMALL_BYTES
        if is_large:
            self._forget(num_bytes)
            with self._room:
                self._room.wait_for(lambda: self._large_bytes + num_bytes <= self._limit_bytes)
                self._large_bytes += num_bytes
        inner = LLMatcher(self._by_stops[stop_token_ids], grammar, log_level=0, limits=parser_limits())
        compiled = _Compiled(inner, num_bytes)
        if is_large:
            finalize(compiled, self._give_back, num_bytes)
        if inner.is_error():
            raise RequestError(f"the grammar cannot be followed: {reason_of(inner)}")
        return compiled

    def _forget(self, num_bytes: int) -> None:
        """Drop the latest grammars that are too many, or stand in the way of so many bytes."""
        dropped = []
        with self._lock:
            while self._latest and (
                len(self._latest) > MAX_LATEST
                or sum(one.num_bytes for one in self._latest.values()) + num_bytes > self._limit_bytes // 2
            ):
                dropped.append(self._latest.popitem(last=False))
        del dropped  # outside of the lock: what nobody uses ends here

    def _give_back(self, num_bytes: int) -> None:
        with self._room:
            self._large_bytes -= num_bytes
            self._room.notify_all()

    def _read(self, stop_token_ids: frozenset[int]) -> LLTokenizer:
        text = read_tokenizer_file(self._checkpoint)
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=sorted(stop_token_ids))


def _give_way() -> None:
    """Lets this thread's work wait for the model's, where the system has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class _Compiled:
    """A grammar at its start. Copies share all that is large."""

    def __init__(self, inner: LLMatcher, num_bytes: int) -> None:
        self.inner, self.num_bytes = inner, num_bytes


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(
        self,
        compiled: _Compiled,
        vocab_size: int,
        stop_token_ids: frozenset[int],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._compiled = compiled  # is not forgotten while this one is here
        self._inner = compiled.inner.deep_copy()
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self._threads = threads
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._mask: Future[Mask] | None = None
        self._mask_s = 0.0  # the last one took
        self._asked_s = 0.0  # when this one was asked for

    @property
    def is_slow(self) -> bool:
        """Whether the next mask is not there, and this one or the last takes long."""
        if self._mask is None or self._mask.done():
            return False
        return max(self._mask_s, monotonic() - self._asked_s) > SLOW_MASK_S

    def start(self) -> None:
        """Begin to compute what the first token may be."""
        self._asked_s = monotonic()
        self._mask = self._threads.submit(self._compute)

    def apply(self, logits: mx.array) -> mx.array:  # [V]
        """The logits, minus infinity where the grammar does not allow a token."""
        assert self._mask, "a matcher is started before it is asked"
        return mx.where(mx.array(self._mask.result()), logits, NEVER)

    def accept(self, token_id: int) -> None:
        """Go on past this token, and begin to compute what may follow."""
        if token_id not in self._stop_token_ids:
            self._asked_s = monotonic()
            self._mask = self._threads.submit(self._advance, token_id)

    def _advance(self, token_id: int) -> Mask:
        if not self._bits[0, token_id // 32] >> token_id % 32 & 1:
            raise EngineError(f"token {token_id} was drawn, which the grammar does not allow")
        self._inner.consume_token(token_id)
        return self._compute()

    def _compute(self) -> Mask:
        """Some grammars prove to be too large only here. The mask would then be that of a complete answer."""
        started_s = monotonic()
        llguidance.numpy.fill_next_token_bitmask(self._inner, self._bits)
        if self._inner.is_error():
            message = "the grammar is too complex to follow the answer any further"
            raise RequestError(f"{message}: {reason_of(self._inner)}")
        self._mask_s = monotonic() - started_s
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(np.bool_)
