"""A model small enough to predict by hand, for tests of the engine without a checkpoint."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from models.attention.attention import Span
from models.attention.cache import SequenceCache
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.link.messages import ModelInfo

VOCAB = 32
NUM_LAYERS = 3


class FakeCache(SequenceCache):
    """Remembers the tokens themselves."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def states(self, layer: int) -> list[mx.array]:
        return []

    def trim(self, length: int) -> None:
        del self.tokens[length:]


@dataclass
class CountingModel:
    """After token t comes t + 1: its logit is 5, those of the ones after it 4.9, 4.8, ..."""

    num_layers: int = NUM_LAYERS
    layer_s: float = 0.0
    fails_at_token: int | None = None
    damaged_token: int | None = None
    forwards: list[int] = field(default_factory=list)
    on_layer: Callable[[], object] = bool
    num_layers_run: int = 0

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        ids = [int(str(item)) for item in tokens.tolist()]  # type: ignore[union-attr]
        self.forwards.append(len(ids))
        for span in spans:
            assert isinstance(span.cache, FakeCache)
            span.cache.tokens.extend(ids[span.start : span.stop])
        if self.fails_at_token in ids:
            raise OSError(f"token {self.fails_at_token} cannot be read")
        for layer in range(self.num_layers):
            time.sleep(self.layer_s)
            self.num_layers_run += 1
            self.on_layer()
            yield layer
        return tokens.astype(mx.float32)[:, None]

    def logits(self, hidden: mx.array) -> mx.array:
        steps = (mx.arange(VOCAB)[None] - hidden - 1) % VOCAB
        logits = 5 - 0.1 * steps
        return mx.where(
            hidden == -1 if self.damaged_token is None else hidden == self.damaged_token, mx.nan, logits
        )

    def make_cache(self) -> FakeCache:
        return FakeCache()


def make_backend(
    model: CountingModel | None = None, context_length: int = 64, rows: int = 2048, **limits: Any
) -> Backend:
    """A backend over the counting model; passes over prompts take at most `rows` rows."""
    info = ModelInfo(VOCAB, context_length)
    return Backend(model or CountingModel(), info, limits=Limits(pass_rows=rows, **limits))
