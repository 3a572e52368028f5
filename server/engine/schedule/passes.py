"""One forward over parts of several sequences, layer by layer. Made and advanced by the engine's loop.

Between two layers other forwards may run. A pass that is not completed is abandoned: then the caches are what
they were before.
"""

from collections.abc import Sequence as Rows

import mlx.core as mx

from models.attention.attention import Span
from server.engine.model_protocol import EngineModel
from server.engine.schedule.sequence import PassPart, State


class Pass:
    """The parts' rows stand in the batch one after the other, in the order given."""

    def __init__(self, model: EngineModel, parts: Rows[PassPart]) -> None:
        self.parts = list(parts)
        self.num_layers_done = 0
        self.is_amid_layer = False  # other steps may run now, but no other pass over many rows
        self.seconds = 0.0  # spent on it, by the loop's clock
        self.told_s = 0.0  # how much of that its clients know
        self.turn_s = 0.0  # of them, since it shares the time with another pass
        self.is_reading = not all(part.sequence.state is State.DECODING for part in parts)
        self._caches = [part.sequence.running_cache for part in parts]
        self._lengths = [cache.length for cache in self._caches]
        self._written: list[mx.array] = []
        tokens: list[int] = []
        spans: list[Span] = []
        for part in parts:
            spans.append(_span_of(part, len(tokens)))
            start = part.sequence.num_before
            tokens += part.sequence.tokens(start, start + part.num_rows)
        self._spans = spans
        self._layers = model.forward(mx.array(tokens), spans)

    @property
    def num_rows(self) -> int:
        """Rows of the whole batch."""
        return self._spans[-1].stop

    @property
    def is_wanted(self) -> bool:
        """Whether a client still waits for any of its sequences."""
        return not all(part.sequence.is_cancelled for part in self.parts)

    def advance(self) -> mx.array | None:  # [N, H]
        """Computes one more layer, or a part of one.

        Returns the hidden rows after the last layer, before that None.
        """
        try:
            layer = next(self._layers)
        except StopIteration as end:
            hidden: mx.array = end.value
            # index keys that nothing has read yet would otherwise stay pending, step after step
            mx.async_eval(hidden, *self._written)  # type: ignore[no-untyped-call]
            return hidden
        self.is_amid_layer = layer is None
        if layer is None:
            return None
        self.num_layers_done += 1
        for cache in self._caches:
            self._written += cache.states(layer)
        return None

    def rows_of(self, index: int) -> tuple[int, int]:
        """Where the rows of a part start and stop."""
        span = self._spans[index]
        return span.start, span.stop

    def length_before(self, index: int) -> int:
        """Tokens that the cache of a part held when the pass began."""
        return self._lengths[index]

    def abandon(self) -> None:
        """Ends the pass and takes back what its layers have written."""
        self._layers.close()
        for index in range(len(self.parts)):
            self.undo(index)

    def undo(self, index: int) -> None:
        """Takes back the rows of one part, and those that it adopted."""
        self._caches[index].trim(self._lengths[index])


def _span_of(part: PassPart, start: int) -> Span:
    sequence, stop = part.sequence, start + part.num_rows
    if sequence.leader is None:
        return Span(sequence.running_cache, start, stop)
    return Span(sequence.running_cache, start, stop, sequence.leader.running_cache, sequence.follows_to)
