"""Rank 0 of a cluster: its loop computes with a model that tells the other ranks what it is asked.

Forwards, and what changes a cache between them, are repeated by every rank; nothing else need be.
"""

import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from config.errors import ClusterError, DiskError
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from server.engine.cluster.meeting import Guest
from server.engine.cluster.rank_messages import (
    Advanced,
    Begun,
    Changed,
    Dropped,
    GivenUp,
    Gone,
    Loaded,
    Made,
    NumberedSpan,
    RankMessage,
    Repeated,
    Welcome,
)
from server.engine.model_protocol import EngineModel

log = logging.getLogger(__name__)


class Leader:
    """The other ranks, in order, as rank 0 sees them. Any that is lost ends this process, in words."""

    def __init__(self, guests: Sequence[Guest], address: str) -> None:
        self._addresses = (address, *(guest.address for _, guest in guests))
        self.welcome = Welcome(0, self._addresses)
        self._wires = [wire for wire, _ in guests]
        self._loaded = threading.Semaphore(0)
        self._tell_lost: Callable[[str], None] = log.error
        for rank, wire in enumerate(self._wires, start=1):
            wire.send(Welcome(rank, self._addresses))
            wire.watch(partial(self._hear, rank))

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """Has `tell` hear, on another thread, why this process ends."""
        self._tell_lost = tell

    def tell(self, message: Repeated) -> None:
        """Has all other ranks repeat something."""
        for wire in self._wires:
            wire.send(message)

    def wait_until_loaded(self, report: Callable[[str], None]) -> None:
        """Returns when all other ranks have their part of the model."""
        for _ in self._wires:
            while not self._loaded.acquire(timeout=1.0):
                report("the other machines open their parts")

    def _hear(self, rank: int, message: RankMessage) -> None:
        match message:
            case Loaded():
                self._loaded.release()
            case Gone(reason):
                self._tell_lost(f"rank {rank} of the cluster ({self._addresses[rank]}) {reason}")
                os._exit(1)


class LedCache:
    """A cache of rank 0; whatever changes it between forwards happens to those of the other ranks too."""

    def __init__(self, own: SequenceCache, number: int, tell: Callable[[Repeated], None]) -> None:
        self.own, self.number, self._tell = own, number, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def trim(self, length: int) -> None:
        self._change("trim", length)

    def expect(self, tokens: int) -> None:
        self._change("expect", tokens)

    def want(self, lengths: Sequence[int]) -> None:
        self._change("want", tuple(lengths))

    def fill_rows(self, *blocks_and_sizes: Any) -> None:
        self._change("fill_rows", *blocks_and_sizes)

    def fill_state(self, *payload_and_length: Any) -> None:
        self._change("fill_state", *payload_and_length)

    def _change(self, method: str, *arguments: Any) -> None:
        getattr(self.own, method)(*arguments)
        self._tell(Changed(self.number, method, arguments))


class LedModel:
    """Computes as `model` does, and has every other rank compute the same."""

    def __init__(self, model: EngineModel, tell: Callable[[Repeated], None]) -> None:
        self._model, self._send = model, tell
        self._numbers = itertools.count()
        self._dropped: deque[int] = deque()  # by finalizers, which may run amid a message

    @property
    def num_layers(self) -> int:
        return self._model.num_layers

    def logits(self, hidden: mx.array) -> mx.array:
        return self._model.logits(hidden)

    def make_cache(self) -> SequenceCache:
        number = next(self._numbers)
        self._tell(Made(number))
        cache = LedCache(self._model.make_cache(), number, self._tell)
        weakref.finalize(cache, self._dropped.append, number)
        return cast(SequenceCache, cache)

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        """Every pause of every rank is the same one, so that other forwards run there on all of them."""
        forward, numbered = next(self._numbers), tuple(map(_numbered, spans))
        self._tell(Begun(forward, np.array(tokens, np.int32).tobytes(), numbered))
        steps, is_over = self._model.forward(tokens, [_own(span) for span in spans]), False
        try:
            while True:
                self._tell(Advanced(forward))
                try:
                    pause = next(steps)
                except StopIteration as end:
                    is_over = True
                    hidden: mx.array = end.value
                    return hidden
                yield pause
        except DiskError:  # of all ranks
            raise
        except ClusterError:  # nobody repeats anything any more
            is_over = True
            raise
        except Exception as error:  # of this rank alone: the others wait in the middle of a layer
            raise ClusterError(f"rank 0 of the cluster: {type(error).__name__}: {error}") from error
        finally:
            if not is_over:
                steps.close()
                self._tell(GivenUp(forward))

    def _tell(self, message: Repeated) -> None:
        while self._dropped:
            self._send(Dropped(self._dropped.popleft()))
        self._send(message)


def _own(span: Span) -> Span:
    cache, origin = (cast("LedCache | None", held) for held in (span.cache, span.origin))
    assert cache is not None, "a span has a cache"
    return replace(span, cache=cache.own, origin=origin.own if origin else None)


def _numbered(span: Span) -> NumberedSpan:
    cache, origin = (cast("LedCache | None", held) for held in (span.cache, span.origin))
    assert cache is not None, "a span has a cache"
    origin_number = origin.number if origin else None
    return NumberedSpan(cache.number, span.start, span.stop, origin_number, span.num_shared)
