"""The scheduler in every order of arrivals and cancels, at every layer: the others are not disturbed."""

from itertools import product

import pytest

from server.engine.schedule import scheduler
from server.engine.schedule.limits import Limits
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import Sequence
from server.link.messages import Cancel, Failed, Finished
from tests.server.engine.driven import TimedModel, World, ask

# Each layer takes a second: a command at half past falls between two layers.
LAYERS = 3
ARRIVALS = (0.5, 2.5, 4.5, 7.5)
LEAVES = (None, 0.6, 1.5, 3.5, 6.5, 9.5, 20.5)
# 40 tokens of prompt and 6 of an answer fit once, and twice only at first: then one is suspended.
ROOMY, TIGHT = 400, 82


@pytest.fixture(autouse=True)
def suspended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever gave its place in the KV to another: room is set aside for one token of an answer only."""
    names: list[str] = []
    suspend = Scheduler.suspend

    def note(self: Scheduler, sequence: Sequence) -> None:
        names.append(sequence.request.request_id)
        suspend(self, sequence)

    monkeypatch.setattr(Scheduler, "suspend", note)
    monkeypatch.setattr(scheduler, "KV_HEADROOM", 1)
    return names


def run(arrival: float, leaves: tuple[float | None, float | None], kv_tokens: int) -> World:
    """Two agents, of which each may leave; the books balance in the end."""
    world = World()
    model = TimedModel(world=world, cost=lambda rows: 1.0, num_layers=LAYERS)
    world.at(0.0, ask("a", 40, 6))
    world.at(arrival, ask("b", 36, 6))
    for name, leave in zip("ab", leaves, strict=True):
        if leave is not None:
            world.at(leave, Cancel(name))
    world.run(model, context=200, limits=Limits(kv_tokens=kv_tokens, pass_rows=50))
    return world


@pytest.mark.slow
@pytest.mark.parametrize("kv_tokens", [ROOMY, TIGHT])
def test_whoever_stays_is_answered_as_if_alone(kv_tokens: int, suspended: list[str]) -> None:
    play_all(kv_tokens)
    assert bool(suspended) == (kv_tokens == TIGHT)


def play_all(kv_tokens: int) -> None:
    """All 196 orders."""
    whole = run(0.5, (None, None), ROOMY)
    for arrival, *leaves in product(ARRIVALS, LEAVES, LEAVES):
        world = run(arrival, (leaves[0], leaves[1]), kv_tokens)
        assert not [event for _, event in world.events if isinstance(event, Failed)]
        for name, leave in zip("ab", leaves, strict=True):
            ends = world.times_of(name, Finished)
            came = arrival if name == "b" else 0.0
            if leave is None or leave < came:  # a cancel of what has not come means nothing
                assert len(ends) == 1, (arrival, leaves)
                assert world.tokens_of(name) == whole.tokens_of(name)
            else:
                assert len(ends) <= 1


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that forgets those that wait when another one ends."""
    retire = Scheduler.retire

    def forget(self: Scheduler, sequence: Sequence) -> None:
        retire(self, sequence)
        self._waiting.clear()

    monkeypatch.setattr(Scheduler, "retire", forget)
    with pytest.raises(AssertionError):
        play_all(TIGHT)
