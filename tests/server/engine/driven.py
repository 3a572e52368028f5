"""The engine's loop in a world of its own time: requests arrive when a test says, layers cost as much."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import cast

import mlx.core as mx

from models.attention.attention import Span
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.link.messages import Command, Event, Finished, Generate, ModelInfo, Sampling, Shutdown, Token
from tests.server.engine.fakes import VOCAB, CountingModel

GREEDY = Sampling(temperature=0)


@dataclass
class World:
    """A clock that only layers move, and what arrives at which time. Stands in for the engine's inbox."""

    arrivals: list[tuple[float, Command]] = field(default_factory=list)
    now_s: float = 0.0
    events: list[tuple[float, Event]] = field(default_factory=list)
    on_event: Callable[[Event], object] = lambda event: None

    def at(self, time_s: float, *commands: Command) -> None:
        """These commands come at that time."""
        self.arrivals += [(time_s, command) for command in commands]
        self.arrivals.sort(key=lambda item: item[0])

    def clock(self) -> float:
        return self.now_s

    def empty(self) -> bool:
        return not self.arrivals or self.arrivals[0][0] > self.now_s

    def get(self, timeout: float | None = None) -> Command:
        """The next arrival, if it comes in time; Shutdown when nobody comes any more."""
        if not self.arrivals:
            return Shutdown()
        if timeout is not None and self.arrivals[0][0] > self.now_s + timeout:
            self.now_s += timeout
            raise Empty
        time_s, command = self.arrivals.pop(0)
        self.now_s = max(self.now_s, time_s)
        return command

    def put(self, command: Command) -> None:
        """A command of the engine's own comes at once."""
        self.arrivals.insert(0, (self.now_s, command))

    def send(self, event: Event) -> None:
        self.events.append((self.now_s, event))
        self.on_event(event)

    def run(
        self, model: CountingModel, *, context: int = 100_000, limits: Limits | None = None
    ) -> EngineLoop:
        """Serve all arrivals to the end; the books balance then."""
        backend = Backend(model, ModelInfo(VOCAB, context), limits=limits or Limits(kv_tokens=context))
        inbox = cast("SimpleQueue[Command]", self)
        loop = EngineLoop(backend, inbox, self.send, clock=self.clock)
        loop.run()
        loop.check_integrity()
        assert loop.measure()["running"] == loop.measure()["waiting"] == loop.measure()["kv_tokens"] == 0
        return loop

    def times_of(self, request_id: str, kind: type[Event] = Token) -> list[float]:
        """When such events of a request were sent."""
        return [time_s for time_s, event in self.events if _is_of(event, kind, request_id)]

    def tokens_of(self, request_id: str) -> list[int]:
        """The text of an answer."""
        return [event.score.token_id for _, event in self.events if isinstance(event, Token)
                and event.request_id == request_id]  # fmt: skip

    def finished_s(self, request_id: str) -> float:
        """When a request was complete."""
        [time_s] = self.times_of(request_id, Finished)
        return time_s


def _is_of(event: Event, kind: type[Event], request_id: str) -> bool:
    return isinstance(event, kind) and getattr(event, "request_id", None) == request_id


@dataclass
class TimedModel(CountingModel):
    """Each layer takes `cost(rows)` seconds of the world's time."""

    world: World = field(default_factory=World)
    cost: Callable[[int], float] = lambda rows: 0.001 * rows
    num_layers: int = 10
    num_parts: int = 1  # of a layer of more than eight rows
    parts: list[tuple[int, int | None]] = field(default_factory=list)  # rows and layer of each pause

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        layers = super().forward(tokens, spans)
        self.num_layers_run = 0
        for layer in range(self.num_layers):
            if layer == 0:
                next(layers)
            num_parts = self.num_parts if tokens.shape[0] > 8 else 1
            for part in range(1, num_parts + 1):
                self.world.now_s += self.cost(tokens.shape[0]) / num_parts
                pause = layer if part == num_parts else None
                self.parts.append((tokens.shape[0], pause))
                yield pause
        return tokens.astype(mx.float32)[:, None]


def prompt(length: int, first: int = 0) -> tuple[int, ...]:
    """Token ids after which the counting model knows what comes."""
    return tuple((first + i) % VOCAB for i in range(length))


def ask(name: str, length: int, max_tokens: int, agent: str = "") -> Generate:
    """A request of an agent of the same name, unless told otherwise."""
    return Generate(name, prompt(length), max_tokens, GREEDY, agent=agent or name)


def answer(length: int, max_tokens: int) -> list[int]:
    """What the counting model answers to `prompt(length)`."""
    return [(length + i) % VOCAB for i in range(max_tokens)]


def longest_gap(times: list[float]) -> float:
    return max(b - a for a, b in pairwise(times))
