"""The scheduler with saved prefixes, in every order of arrivals, cancels, failing steps, deaths.

The model's answers depend on every row of the cache, so that a row restored or adopted wrongly changes them.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product

import mlx.core as mx
import pytest

from models.attention.attention import Span
from models.attention.cache import RowCache, SequenceCache
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import PrefixCache
from server.engine.prefix.states import BLOCK_TOKENS
from server.engine.schedule import scheduler
from server.engine.schedule.limits import Limits
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import Sequence as Request
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import Administer, Cancel, Event, Failed, Finished, Generate, ModelInfo
from tests.server.engine.driven import GREEDY, TimedModel, World, prompt
from tests.server.engine.fakes import VOCAB

# A layer takes a second: what comes at half past falls between two layers.
LAYERS = 2
SHARED = prompt(BLOCK_TOKENS + 6)
PROMPTS = {"a": (*SHARED, 1, 2, 3), "b": (*SHARED, 7), "c": (*SHARED[:BLOCK_TOKENS], 9, 9)}
NUM_ANSWERED = 3
# Both prompts fit; the second is suspended when their answers grow.
ROOMY, TIGHT = 400, 2 * len(PROMPTS["a"]) + 2
TIMES = (0.5, 1.5, 2.5, 4.5, 6.5, 8.5)
KINDS = ("leave a", "leave b", "fault", "death", "clear")


class Died(BaseException):
    """The engine process is gone: nothing in it may catch this."""


class RowsCache(SequenceCache):
    """A row for each token, which is the token itself."""

    def __init__(self) -> None:
        self.latents, self.index_keys = [RowCache(1, mx.float32)], {}

    def states(self, layer: int) -> list[mx.array]:
        return [self.latents[0].state]


@dataclass
class RowsModel(TimedModel):
    """What comes next depends on all rows and their places. Fails, or dies, in the layers of some times."""

    num_layers: int = LAYERS
    faults: list[float] = field(default_factory=list)
    deaths: list[float] = field(default_factory=list)
    num_fatal: int = 0  # steps of one request that failed

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        hidden = []
        for span in spans:
            rows = span.append(lambda cache: cache.latents[0], tokens[span.start : span.stop, None])[:, 0]
            hidden.append((mx.cumsum(rows * (1 + mx.arange(rows.size))) % VOCAB)[-span.rows :])
        for layer in range(self.num_layers):
            self.world.now_s += 1.0
            if self.deaths and self.deaths[0] < self.world.now_s:
                self.deaths.pop(0)
                raise Died
            if self.faults and self.faults[0] < self.world.now_s:
                self.faults.pop(0)
                self.num_fatal += len(spans) == 1
                raise OSError("an expert could not be read")
            yield layer
        return mx.concatenate(hidden)[:, None]

    def make_cache(self) -> RowsCache:  # type: ignore[override]
        return RowsCache()


@dataclass
class Life:
    """One run of clients and engines; what is saved outlives an engine, as the disk does."""

    kv_tokens: int
    events: tuple[tuple[float, str], ...] = ()
    world: World = field(default_factory=World)
    saved: PrefixCache | None = None
    num_deaths: int = 0
    num_fatal: int = 0

    def run(self, arrivals: dict[str, float]) -> "Life":
        times = {kind: [at for at, one in self.events if one == kind] for kind in KINDS}
        model = RowsModel(world=self.world, faults=times["fault"], deaths=times["death"])
        for name, at in arrivals.items():
            self.world.at(at, ask(name))
        for at, kind in self.events:
            if kind.startswith("leave"):
                self.world.at(at, Cancel(kind[-1]))
            if kind == "clear":
                self.world.at(at, Administer("clear 1", "clear"))
        while not self._live(model):
            self.num_deaths += 1
            self._ask_again(arrivals)
        self.num_fatal = model.num_fatal
        return self

    def _live(self, model: RowsModel) -> bool:
        """One life of an engine; False where it dies."""
        prefixes = SavedPrefixes(self.saved) if self.saved else None
        backend = Backend(model, ModelInfo(VOCAB, 200), limits=Limits(kv_tokens=self.kv_tokens, pass_rows=50))
        loop = EngineLoop(backend, self.world, self.world.send, prefixes=prefixes, clock=self.world.clock)  # type: ignore[arg-type]
        try:
            loop.run()
        except Died:
            return False
        loop.check_integrity()
        assert loop.measure()["running"] == loop.measure()["waiting"] == loop.measure()["kv_tokens"] == 0
        if self.saved:
            self.saved.check_integrity()
        return True

    def _ask_again(self, arrivals: dict[str, float]) -> None:
        """Clients hear of a death and ask once more, unless they have left or have their answer."""
        now_s = self.world.now_s
        for name, came in arrivals.items():
            has_left = any(kind == f"leave {name}" and came <= at <= now_s for at, kind in self.events)
            coming = [_name(one) for _, one in self.world.arrivals if isinstance(one, Generate)]
            if not (name in coming or has_left or self.ends(name)):
                self.world.events = [(at, one) for at, one in self.world.events if _name(one) != name]
                self.world.at(now_s, ask(name))

    def ends(self, name: str) -> list[Event]:
        ends = (Finished, Failed)
        return [one for _, one in self.world.events if isinstance(one, ends) and _name(one) == name]

    def check(self, arrivals: dict[str, float], alone: dict[str, list[int]]) -> None:
        """Those that stay have one end, and it is right, or a fault that was planted."""
        num_failed = 0
        for name, came in arrivals.items():
            left = [at for at, kind in self.events if kind == f"leave {name}" and at >= came]
            ends = self.ends(name)
            assert len(ends) == 1 or (left and not ends), (name, self.events, self.kv_tokens)
            if ends and isinstance(ends[0], Failed):
                num_failed += 1
            elif ends:
                assert self.world.tokens_of(name) == alone[name], (name, self.events, self.kv_tokens)
        assert num_failed <= self.num_fatal, "requests fail by steps of their own, not by those of others"


def _name(message: object) -> str:
    return str(getattr(message, "request_id", ""))


def ask(name: str) -> Generate:
    return Generate(name, PROMPTS[name], NUM_ANSWERED, GREEDY, agent=name)


@pytest.fixture(scope="module", autouse=True)
def little_room() -> Iterator[None]:
    """Room is set aside for one token of an answer only, so that sequences outgrow it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "KV_HEADROOM", 1)
        yield


def play(depth: int, names: str, arrivals: Sequence[float], times: Sequence[float] = TIMES) -> int:
    """All orders of at most `depth` events, for each arrival of the later clients; how many lives it took."""
    alone = {name: Life(ROOMY).run({name: 0.0}).world.tokens_of(name) for name in names}
    kinds = [kind for kind in KINDS if kind[-1] in names or not kind.startswith("leave")]
    moments = list(product(times, kinds))
    num_played = 0
    for kv_tokens, later in product((ROOMY, TIGHT), product(arrivals, repeat=len(names) - 1)):
        came = dict(zip(names, (0.0, *later), strict=True))
        for events in combinations_with_replacement(moments, depth):
            if list(events) != sorted(set(events)) and depth > 1:
                continue
            life = Life(kv_tokens, events, saved=PrefixCache(bytes(32), 10**6)).run(came)
            life.check(came, alone)
            num_played += 1
    return num_played


@pytest.mark.slow
def test_requests_that_share_a_prompt_end_rightly_in_every_order() -> None:
    assert play(1, "ab", (0.5, 2.5, 4.5)) == 180
    assert play(2, "ab", (1.5,), TIMES[1:5]) > 300


@pytest.mark.long
def test_three_of_them_do() -> None:
    assert play(2, "abc", (0.5, 2.5, 4.5)) > 5000
    assert play(3, "ab", (1.5,), TIMES[1:5]) == 1120


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost leader", "waiting", "rows"])
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match fault:
        case "lost leader":  # followers of a sequence that has gone take its rows for read
            monkeypatch.setattr(Request, "has_lost_leader", False)
        case "waiting":  # those that wait are forgotten with one that ends
            retire = Scheduler.retire
            monkeypatch.setattr(
                Scheduler, "retire", lambda self, one: (retire(self, one), self._waiting.clear())
            )
        case "rows":  # a prefix is restored to its last token and one less
            trim = RowCache.trim
            monkeypatch.setattr(RowCache, "trim", lambda self, length: trim(self, max(0, length - 1)))
    with pytest.raises(AssertionError):
        play(2, "ab", (0.5,), TIMES[:4])
