"""A rank of a cluster other than the first, as a process: `python -m server.engine.cluster.follower`.

Reads its EngineConfig from standard input, comes to rank 0, opens its part of the model and repeats what it
is told. It ends when rank 0 ends or standard input does: whoever started it starts it again.
"""

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Generator
from queue import SimpleQueue

import mlx.core as mx
import numpy as np

from config.errors import DiskError, UsageError
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.loading.loading import open_checkpoint
from server.engine.backend import open_model
from server.engine.cluster.meeting import facts_of, free_address, knock
from server.engine.cluster.part import join
from server.engine.cluster.rank_messages import (
    Advanced,
    Begun,
    Changed,
    Dropped,
    GivenUp,
    Gone,
    Introduction,
    Loaded,
    Made,
    RankMessage,
    Repeated,
    Welcome,
)
from server.engine.model_protocol import EngineModel
from server.link.messages import EngineConfig
from server.logs import set_up_logging

log = logging.getLogger(__name__)


def main() -> int:
    """Follow rank 0 once. Returns 2 where a person must act first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # who started it obeys them
        signal.signal(number, signal.SIG_IGN)
    config = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    set_up_logging(config.log_level, config.log_format, config.log_file)
    try:
        return _follow(config)
    except UsageError as error:
        log.error("%s", error)
        return 2


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, whose lock Python wants when it ends
    os._exit(0)


def _follow(config: EngineConfig) -> int:
    cluster = config.cluster
    assert cluster is not None, "only machines of a cluster follow"
    checkpoint, arithmetic = open_checkpoint(config.model_path), choose_arithmetic()
    address = free_address(cluster.addresses[cluster.node])
    wire = knock(cluster, Introduction(cluster.node, address, facts_of(cluster, checkpoint, arithmetic)))
    welcome = wire.receive(is_patient=True)  # others may still have to come
    if not isinstance(welcome, Welcome):
        log.warning("rank 0 has not let this rank in, or has ended: its log says why")
        return 0
    inbox: SimpleQueue[RankMessage] = SimpleQueue()
    wire.watch(lambda message: os._exit(0) if isinstance(message, Gone) else inbox.put(message))
    try:
        exchange = join(welcome, checkpoint)
        opened = open_model(config, checkpoint, arithmetic, lambda fraction, text: None, exchange)
        wire.send(Loaded())
        repeater = Repeater(opened.model)
        while True:
            message = inbox.get()
            assert isinstance(message, Repeated), "rank 0 tells what to repeat"
            repeater.repeat(message)
    except Exception as error:  # the process ends here, and rank 0 says why
        log.exception("this rank of the cluster has failed")
        wire.send(Gone(f"has failed: {type(error).__name__}: {error}"))
        return 1


class Repeater:
    """Calls the model as rank 0 calls its own."""

    def __init__(self, model: EngineModel) -> None:
        self._model = model
        self._caches: dict[int, SequenceCache] = {}
        self._forwards: dict[int, tuple[Generator[int | None, None, mx.array], list[Span]]] = {}

    def repeat(self, message: Repeated) -> None:
        """Makes one call. Rank 0 reports errors that all ranks have alike; they have no consequence here."""
        match message:
            case Made(cache):
                self._caches[cache] = self._model.make_cache()
            case Dropped(cache):
                del self._caches[cache]
            case Changed(cache, method, arguments):
                getattr(self._caches[cache], method)(*arguments)
            case Begun(forward):
                self._forwards[forward] = self._begin(message)
            case Advanced(forward):
                self._advance(forward)
            case GivenUp(forward):
                if held := self._forwards.pop(forward, None):
                    held[0].close()

    def _begin(self, begun: Begun) -> tuple[Generator[int | None, None, mx.array], list[Span]]:
        spans = [
            Span(
                self._caches[span.cache],
                span.start,
                span.stop,
                None if span.origin is None else self._caches[span.origin],
                span.num_shared,
            )
            for span in begun.spans
        ]
        return self._model.forward(mx.array(np.frombuffer(begun.tokens, np.int32)), spans), spans

    def _advance(self, forward: int) -> None:
        steps, spans = self._forwards[forward]
        try:
            next(steps)
        except StopIteration as end:
            layers = range(self._model.num_layers)
            mx.eval(end.value, *(span.cache.states(layer) for span in spans for layer in layers))
            del self._forwards[forward]
        except DiskError as error:
            log.error("%s", error)
            del self._forwards[forward]


if __name__ == "__main__":
    sys.exit(main())
