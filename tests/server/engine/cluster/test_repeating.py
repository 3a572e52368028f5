"""Whatever the loop does with its model on rank 0, another rank that repeats it computes the same bits."""

import pickle
from collections.abc import Generator, Sequence
from queue import SimpleQueue

import mlx.core as mx
import numpy as np
import pytest

from config.errors import ClusterError, DiskError
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.experts.experts import run_through
from models.glm_moe_dsa import Model
from server.engine.cluster.follower import Repeater
from server.engine.cluster.leader import LedModel
from server.engine.cluster.rank_messages import Changed, GivenUp, Repeated
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import PrefixCache
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
)
from tests.models.families.family_cases import CASES
from tests.server.engine.fakes import CountingModel
from tests.tiny_model import make_model

GREEDY = Sampling(temperature=0)
FIRST, AGAIN = range(4), range(4, 8)


class Recorded:
    """A model that keeps what its forwards come to."""

    def __init__(self, inner: Model) -> None:
        self._inner, self.num_layers = inner, inner.num_layers
        self.hidden: list[np.ndarray] = []

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        hidden = yield from self._inner.forward(tokens, spans)
        self.hidden.append(np.array(hidden))
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        return self._inner.logits(hidden)

    def make_cache(self) -> SequenceCache:
        return self._inner.make_cache()


def requests() -> list[Generate]:
    """Prompts with a common beginning, and the same once more, longer: they are restored."""
    beginning = np.random.default_rng(5).integers(4, 64, 70).tolist()
    prompts = [beginning + np.random.default_rng(n).integers(4, 64, 10 + 9 * n).tolist() for n in FIRST]
    prompts += [[*prompt, 5, 6, 7] for prompt in prompts]
    return [Generate(str(number), prompt, 6, GREEDY) for number, prompt in enumerate(prompts)]


def serve(led: LedModel) -> list[str]:
    """Runs all requests, four at a time, of which one leaves amid its answer; returns those completed."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    waiting = requests()
    done: list[str] = []

    def send(event: Event) -> None:
        if isinstance(event, Token) and event.request_id == "2":
            inbox.put(Cancel("2"))
        if isinstance(event, Finished | Failed):
            assert isinstance(event, Finished), event
            done.append(event.request_id)
        if isinstance(event, Finished) and len(done) == len(FIRST) - 1:
            for request in waiting[len(FIRST) :]:
                inbox.put(request)
        if len(done) == len(waiting) - 1:
            inbox.put(Shutdown())

    for request in waiting[: len(FIRST)]:
        inbox.put(request)
    prefixes = SavedPrefixes(PrefixCache(bytes(32), 10**9))
    backend = Backend(led, ModelInfo(64, 4096), limits=Limits(pass_rows=90))
    EngineLoop(backend, inbox, send, prefixes=prefixes).run()
    return done


class Ranks:
    """Rank 0 and one that repeats its calls, with the same weights, and what crossed between them."""

    def __init__(self, family: str) -> None:
        case = CASES[family]
        weights = case.make_weights(case.wide, 3)
        self.first, self.other = (Recorded(make_model(case.wide, weights)) for _ in range(2))
        self.repeater, self.told = Repeater(self.other), list[Repeated]()
        self.led = LedModel(self.first, self._tell)

    def _tell(self, message: Repeated) -> None:
        self.told.append(message)
        self.repeater.repeat(pickle.loads(pickle.dumps(message)))

    def check(self, num_forwards: int) -> None:
        """Both have computed the same, and so many forwards at least."""
        assert len(self.first.hidden) == len(self.other.hidden) >= num_forwards
        for one, two in zip(self.first.hidden, self.other.hidden, strict=True):
            assert np.array_equal(one, two)


@pytest.mark.parametrize("family", CASES)
def test_a_rank_that_repeats_the_loops_calls_computes_the_same_bits(family: str) -> None:
    ranks = Ranks(family)
    assert sorted(serve(ranks.led)) == [str(n) for n in (*FIRST, *AGAIN) if n != 2]
    assert any(isinstance(message, Changed) and message.method == "fill_rows" for message in ranks.told)
    ranks.check(len(FIRST))
    last = ranks.led.make_cache()
    assert len(ranks.repeater._caches) == 1, "nothing is kept that rank 0 has dropped"
    assert not ranks.repeater._forwards
    del last


@pytest.mark.parametrize("family", CASES)
def test_what_is_given_up_amid_its_layers_is_taken_back_on_all_ranks(family: str) -> None:
    ranks = Ranks(family)
    cache = ranks.led.make_cache()

    def steps(num_rows: int) -> Generator[int | None, None, mx.array]:
        return ranks.led.forward(mx.arange(num_rows), [Span(cache, 0, num_rows)])

    cache.want([20])
    run_through(steps(40))
    given_up = steps(50)
    for _ in range(5):
        next(given_up)
    given_up.close()
    cache.trim(25)  # a cache with states goes back to the one that was wanted
    run_through(steps(3))
    ranks.check(2)


class Failing(CountingModel):
    """Fails in its second layer."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        yield 0
        raise self._error


@pytest.mark.parametrize(
    ("error", "raised"), [(DiskError("no bytes"), DiskError), (RuntimeError("no memory"), ClusterError)]
)
def test_a_fault_of_all_ranks_is_the_steps_own_and_one_of_rank_0_the_clusters(
    error: Exception, raised: type[Exception]
) -> None:
    told: list[Repeated] = []
    led = LedModel(Failing(error), told.append)
    steps = led.forward(mx.array([1]), [Span(led.make_cache(), 0, 1)])
    next(steps)
    with pytest.raises(raised, match=str(error)):
        next(steps)
    assert isinstance(told[-1], GivenUp)
