"""What the engine asks of a model: the flat forward, logits and caches. Owns nothing."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from models.attention.attention import Span
from models.attention.cache import SequenceCache
from server.engine.memory.governor import Memory, Ungoverned
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule.limits import Limits
from server.engine.trials import Habit
from server.link.messages import EngineConfig, Heat, ModelInfo
from streaming.eviction.hot_set import HotSet


class EngineModel(Protocol):
    """A language model over flat batches."""

    @property
    def num_layers(self) -> int:
        """How often a forward pauses, those amid layers not counted."""

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        """Yield after each layer, with None also amid those of many rows; return the hidden rows [N, H]."""

    def logits(self, hidden: mx.array) -> mx.array:
        """[M, H] -> [M, V], fp32."""

    def make_cache(self) -> SequenceCache:
        """An empty cache for a new sequence."""


@dataclass(frozen=True)
class Backend:
    """An opened model and what is known about it."""

    model: EngineModel
    info: ModelInfo
    measure: Callable[[], Mapping[str, float]] = dict
    limits: Limits = field(default_factory=Limits)
    prefix: PrefixCache | None = None
    memory: Memory = field(default_factory=Ungoverned)
    habits: Sequence[Habit] = ()
    hot_set: HotSet | None = None
    heat: Callable[[], Heat] = dict
    on_lost: Callable[[Callable[[str], None]], None] = lambda tell: None  # whom to tell of a lost machine


ReportProgress = Callable[[float, str], None]
OpenBackend = Callable[[EngineConfig, ReportProgress], Backend]
