"""What is told of the engine is told when it changes, not only now and then."""

import pytest

from server.engine.telemetry import CROWD_S, Telemetry
from server.link.messages import Event, Failed, Finished, Heat, Progress, Queued, Started, Stats, Usage


class Told:
    """Telemetry of a loop in which nothing is measured but who is here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.crowd = {"running": 0.0, "waiting": 0.0, "agents": 0.0}
        self.events: list[Event] = []
        monkeypatch.setattr("server.engine.telemetry.time.monotonic", lambda: self.now_s)
        self.cells, self.num_taken = b"", 0
        self.telemetry = Telemetry(dict, self.events.append, self.take_heat)
        self.telemetry.watch(lambda: dict(self.crowd))
        self.telemetry.beat(True)

    def take_heat(self) -> Heat:
        self.num_taken += 1
        return {0: (0, 0, self.cells)}

    @property
    def last(self) -> dict[str, float]:
        return self.last_stats.values

    @property
    def last_stats(self) -> Stats:
        return next(event for event in reversed(self.events) if isinstance(event, Stats))


@pytest.mark.parametrize(
    ("event", "crowd"),
    [
        (Started("a"), {"running": 1.0, "agents": 1.0}),
        (Queued("a", 3), {"waiting": 1.0, "agents": 1.0}),
        (Started("a"), {"running": 5.0, "waiting": 2.0, "agents": 3.0}),
    ],
)
def test_who_comes_is_told_with_the_next_beat(
    monkeypatch: pytest.MonkeyPatch, event: Event, crowd: dict[str, float]
) -> None:
    told = Told(monkeypatch)
    told.crowd |= crowd
    told.telemetry.send(event)
    told.telemetry.beat(False)
    assert told.last == told.crowd


def test_who_goes_without_a_word_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    told.crowd["running"] = 2.0
    told.telemetry.send(Started("a"))
    told.telemetry.beat(False)
    told.crowd["running"] = 1.0  # cancelled
    told.now_s += CROWD_S + 0.001
    told.telemetry.beat(False)
    assert told.last["running"] == 1.0


def test_what_does_not_change_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    told.crowd["running"] = 1.0
    told.telemetry.send(Started("a"))
    for _ in range(20):
        told.now_s += 0.1
        told.telemetry.beat(False)
        told.telemetry.send(Progress("a", 1, 2))
    assert len([event for event in told.events if isinstance(event, Stats)]) == 2


@pytest.mark.parametrize("event", [Finished("a", "stop", Usage(1, 1)), Failed("a", "disk", "x")])
def test_the_end_is_told_before_the_last_event(monkeypatch: pytest.MonkeyPatch, event: Event) -> None:
    told = Told(monkeypatch)
    told.crowd["running"] = 1.0
    told.telemetry.send(Started("a"))
    told.telemetry.beat(False)
    told.crowd["running"] = 0.0
    told.telemetry.send(event)
    assert isinstance(told.events[-2], Stats)
    assert told.last["running"] == 0.0


def test_the_heat_is_not_taken_for_each_client_that_comes_and_is_never_left_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told(monkeypatch)
    told.num_taken = 0
    for number in range(20):
        told.crowd["running"] = float(number)
        told.telemetry.send(Started("a"))
        told.telemetry.beat(False)
    told.cells = b"new"
    assert told.num_taken == 0
    told.telemetry.beat(True)
    assert told.last_stats.heat == {0: (0, 0, b"new")}
    told.telemetry.beat(True)
    assert told.num_taken == 1, "nothing has changed"
