"""The loop over a tiny random GLM with a prefix cache, counting the rows that were computed."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import mlx.core as mx

from benchmarks.rig.drive import drive
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import DiskTier, PrefixCache
from server.engine.schedule.limits import Limits
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Sampling,
    Shutdown,
    Token,
    Usage,
)
from tests.server.engine.events import events_of, tokens_of
from tests.tiny_glm import SHARED, make_weights
from tests.tiny_model import make_model

GREEDY = Sampling(temperature=0)
PLENTY = 10**9
FINGERPRINT = bytes(32)
CONFIG = SHARED | {
    "vocab_size": 64,
    "num_hidden_layers": 5,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2,
}
CONTEXT = 16_384


@dataclass
class CountedModel:
    """A model that counts the rows it computes. `on_layer` hears of each layer, while it is under way."""

    inner: Model
    rows: list[int] = field(default_factory=list)
    row_layers: int = 0  # rows times layers, of all passes
    on_layer: Callable[[], object] = bool

    @property
    def num_layers(self) -> int:
        return self.inner.num_layers

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        self.rows.append(tokens.shape[0])
        layers = self.inner.forward(tokens, spans)
        while True:
            try:
                layer = next(layers)
            except StopIteration as end:
                hidden: mx.array = end.value
                return hidden
            if layer is not None:
                self.row_layers += tokens.shape[0]
                self.on_layer()
            yield layer

    def logits(self, hidden: mx.array) -> mx.array:
        return self.inner.logits(hidden)

    def make_cache(self) -> SequenceCache:
        return self.inner.make_cache()

    def take_rows(self) -> int:
        """Rows since this was last asked."""
        count = sum(self.rows)
        self.rows.clear()
        return count


def make_counted_model(seed: int = 3) -> CountedModel:
    return CountedModel(make_model(CONFIG, make_weights(CONFIG, seed)))


def open_prefix(
    directory: Path | None = None, memory: int = PLENTY, fingerprint: bytes = FINGERPRINT
) -> PrefixCache:
    disk = DiskTier(directory, PLENTY, PLENTY) if directory else None
    return PrefixCache(fingerprint, memory, disk)


@dataclass
class Outcome:
    """What became of one request."""

    tokens: list[int]
    usage: Usage


def make_backend(model: CountedModel, rows: int) -> Backend:
    limits = Limits(pass_rows=rows, kv_tokens=8 * CONTEXT)
    return Backend(model, ModelInfo(CONFIG["vocab_size"], CONTEXT), limits=limits)


def make_loop(
    model: CountedModel,
    prefix: PrefixCache | None,
    inbox: SimpleQueue[Command],
    send: Callable[[Event], None],
    rows: int,
) -> EngineLoop:
    prefixes = SavedPrefixes(prefix) if prefix else None
    return EngineLoop(make_backend(model, rows), inbox, send, prefixes=prefixes)


def generate(
    model: CountedModel, prefix: PrefixCache | None, *requests: Generate, rows: int = 2048
) -> dict[str, Outcome]:
    """Serve these requests, all there from the start, and stop."""
    prefixes = SavedPrefixes(prefix) if prefix else None
    served = drive(make_backend(model, rows), requests, prefixes=prefixes)
    return {name: Outcome(served.tokens[name], usage) for name, usage in served.usage.items()}


def ask(
    model: CountedModel,
    prefix: PrefixCache | None,
    prompt: Sequence[int],
    num_tokens: int = 8,
    rows: int = 2048,
) -> Outcome:
    """One greedy answer."""
    return generate(model, prefix, Generate("a", tuple(prompt), num_tokens, GREEDY), rows=rows)["a"]


def leave_after(
    model: CountedModel, prefix: PrefixCache, prompt: Sequence[int], num_layers: int, rows: int
) -> None:
    """A client that asks, and is gone when so many layers have been computed."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    left = [num_layers]

    def on_layer() -> None:
        left[0] -= 1
        if left[0] == 0:
            inbox.put(Cancel("a"))
            inbox.put(Shutdown())

    inbox.put(Generate("a", tuple(prompt), 4, GREEDY))
    model.on_layer = on_layer
    make_loop(model, prefix, inbox, lambda event: None, rows).run()
    model.on_layer = bool


def run_script(
    model: CountedModel,
    prefix: PrefixCache | None,
    first: Sequence[Generate],
    script: Callable[[int], Sequence[Command]],
    awaited: set[str],
    rows: int = 2048,
) -> dict[str, Outcome]:
    """Serve until all awaited have ended; `script` says what comes after each layer, counted from 1."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    outcomes: dict[str, Outcome] = {}
    tokens: dict[str, list[int]] = {}
    num_layers = [0]

    def on_layer() -> None:
        num_layers[0] += 1
        for command in script(num_layers[0]):
            inbox.put(command)

    def send(event: Event) -> None:
        assert not isinstance(event, Failed), event
        if isinstance(event, Token):
            tokens.setdefault(event.request_id, []).append(event.score.token_id)
        if isinstance(event, Finished):
            outcomes[event.request_id] = Outcome(tokens[event.request_id], event.usage)
            if awaited <= outcomes.keys():
                inbox.put(Shutdown())

    for request in first:
        inbox.put(request)
    model.on_layer = on_layer
    loop = make_loop(model, prefix, inbox, send, rows)
    loop.run()
    loop.check_integrity()
    model.on_layer = bool
    return outcomes


def answer(
    model: CountedModel,
    first: Sequence[Generate],
    react: Callable[[Event], Sequence[Command]] = lambda event: [],
) -> dict[str, list[int]]:
    """Answers to those that got one; `react` says what comes after an event."""
    events = events_of(lambda inbox, send: make_loop(model, open_prefix(), inbox, send, 2048), first, react)
    answered = [event.request_id for event in events if isinstance(event, Token)]
    return {request_id: tokens_of(events, request_id) for request_id in answered}
