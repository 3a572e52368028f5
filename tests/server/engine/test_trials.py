"""Habits are kept where they pay on this machine, and cost nothing while nothing is tried."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from models.attention.attention import Span
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.engine.trials import FIRST_PAUSE, LONGEST_PAUSE, Habit, Trials
from server.link.messages import Command, ModelInfo
from tests.checkpoints import open_model, save_packed
from tests.models.make_golden import SEED
from tests.server.engine.driven import World, ask
from tests.server.engine.fakes import VOCAB, CountingModel
from tests.tiny_glm import WIDER, make_weights, tokens

SOON = 200


class Device:
    """Steps that take longer or shorter while each habit is on, with noise; counts what is switched."""

    def __init__(self, costs: dict[str, float], noise: float, seed: int = 0) -> None:
        self.costs, self.noise = costs, noise
        self.on = dict.fromkeys(costs, True)
        self.switches = 0
        self._random = random.Random(seed)

    def habit(self, name: str, fixed: bool | None = None) -> Habit:
        return Habit(name, lambda is_on: self._switch(name, is_on), fixed)

    def _switch(self, name: str, is_on: bool) -> None:
        self.on[name], self.switches = is_on, self.switches + 1

    def step_s(self) -> float:
        cost = sum(self.costs[name] for name, is_on in self.on.items() if is_on)
        return 0.5 * (1 + cost) * self._random.lognormvariate(0, self.noise)


def run(device: Device, trials: Trials, steps: int, rows: Callable[[int], int] = lambda i: 1) -> None:
    for i in range(steps):
        trials.note(rows(i), device.step_s())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("lookahead", "straight"), [(0.15, -0.15), (-0.15, 0.15), (0.3, 0.3), (-0.3, -0.3), (0.12, 0.0)]
)
def test_what_loses_is_off_soon_and_what_wins_stays_on(lookahead: float, straight: float, seed: int) -> None:
    device = Device({"lookahead": lookahead, "straight_reads": straight}, 0.05, seed)
    run(device, Trials([device.habit("lookahead"), device.habit("straight_reads")]), SOON)
    assert device.on["lookahead"] == (lookahead < 0)
    if straight:
        assert device.on["straight_reads"] == (straight < 0)


@pytest.mark.parametrize("seed", range(20))
def test_what_makes_no_difference_is_kept_by_chance_only(seed: int) -> None:
    devices = [Device({"lookahead": 0.0}, 0.1, 100 * seed + i) for i in range(20)]
    for device in devices:
        run(device, Trials([device.habit("lookahead")]), SOON)
    assert sum(device.on["lookahead"] for device in devices) <= 4


def test_nothing_is_switched_between_trials_and_these_grow_rare() -> None:
    device, began = Device({"lookahead": -0.2}, 0.05), list[int]()
    trials = Trials([device.habit("lookahead")])
    for i in range(12 * LONGEST_PAUSE // 8):
        before = device.switches
        trials.note(1, device.step_s())
        if device.switches > before:
            began.append(i)
    pauses = [b - a for a, b in pairwise(began) if b - a > 100]
    assert pauses[0] >= FIRST_PAUSE
    assert all(b >= min(2 * a - 100, LONGEST_PAUSE) for a, b in pairwise(pauses))
    assert len(began) < 200


def test_a_fixed_habit_is_never_tried() -> None:
    device = Device({"lookahead": 0.5, "straight_reads": -0.5}, 0.05)
    trials = Trials([device.habit("lookahead", True), device.habit("straight_reads", False)])
    switches = device.switches
    run(device, trials, 3 * SOON)
    assert device.on == {"lookahead": True, "straight_reads": False}
    assert device.switches == switches
    assert trials.measure() == {"habit.lookahead": 1.0, "habit.straight_reads": 0.0}


def test_steps_of_other_widths_and_prompts_begin_a_trial_again() -> None:
    device = Device({"lookahead": 0.3}, 0.02)
    trials = Trials([device.habit("lookahead")])
    run(device, trials, 2 * SOON, rows=lambda i: 1 + i // 30 % 2)
    assert "habit_gain.lookahead" not in trials.measure()
    for _ in range(10):
        run(device, trials, 40)
        trials.disturb()
    assert "habit_gain.lookahead" not in trials.measure()
    run(device, trials, SOON)
    assert trials.measure()["habit_gain.lookahead"] < 0


def test_a_decision_is_logged_with_its_gain_and_spread(caplog: pytest.LogCaptureFixture) -> None:
    device = Device({"lookahead": 0.3}, 0.02)
    with caplog.at_level("INFO"):
        run(device, Trials([device.habit("lookahead")]), SOON)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("lookahead is off: it saved -2")
    assert "spread" in line


def test_habits_change_no_bit(tmp_path: Path) -> None:
    opened = open_model(save_packed(tmp_path, WIDER, make_weights(WIDER, SEED), lambda path: None), slots=9)
    outputs = []
    for ahead, straight in ((True, True), (False, True), (True, False), (False, False)):
        opened.store.look_ahead(ahead)
        opened.store.read_straight(straight)
        before = opened.store.statistics()
        cache, rows = opened.model.make_cache(), []
        for i, token in enumerate(tokens(WIDER, 12)):
            hidden = opened.model(mx.array([token]), [Span(cache, 0, 1)])
            rows.append(np.array(hidden.astype(mx.float32)))
            assert i < 12
        outputs.append(np.concatenate(rows))
        assert (opened.store.statistics().ahead_started > before.ahead_started) == ahead
    assert all(np.array_equal(outputs[0], other) for other in outputs[1:])
    opened.store.close()


@dataclass
class Streaming(CountingModel):
    """Layers on a simulated device, longer or shorter while each habit is on; counts what is switched."""

    world: World = field(default_factory=World)
    costs: dict[str, float] = field(default_factory=dict)
    on: dict[str, bool] = field(default_factory=dict)
    switched_at: list[int] = field(default_factory=list)  # the step that each switch came before
    chance: random.Random = field(default_factory=lambda: random.Random(3))

    def __post_init__(self) -> None:
        self.on = dict.fromkeys(self.costs, True)
        self.on_layer = self._spend

    def _spend(self) -> None:
        cost = sum(self.costs[name] for name, is_on in self.on.items() if is_on)
        self.world.now_s += 0.1 * (1 + cost) * self.chance.lognormvariate(0, 0.04)

    def habits(self) -> tuple[Habit, ...]:
        def switching(name: str) -> Callable[[bool], None]:
            def switch(is_on: bool) -> None:
                self.on[name] = is_on
                self.switched_at.append(len(self.forwards))

            return switch

        return tuple(Habit(name, switching(name)) for name in self.costs)


def decoded(lookahead: float, straight: float, tokens: int, arrivals: Sequence[float] = ()) -> Streaming:
    """The engine's whole loop: one long answer, and short prompts beside it that come at these times."""
    world = World()
    model = Streaming(world=world, costs={"lookahead": lookahead, "straight_reads": straight})
    world.at(0.0, ask("long", 3, tokens))
    for number, at in enumerate(arrivals):
        world.at(at, ask(f"short {number}", 3, 1))
    info = ModelInfo(VOCAB, 100_000)
    backend = Backend(model, info, limits=Limits(kv_tokens=100_000), habits=model.habits())
    EngineLoop(backend, cast("SimpleQueue[Command]", world), world.send, clock=world.clock).run()
    assert len(world.times_of("long")) == tokens
    return model


@pytest.mark.parametrize(
    ("lookahead", "straight"),
    [(0.15, -0.15), (-0.15, 0.15), (0.3, 0.3), (-0.3, -0.3), (0.1, -0.4), (-0.2, 0.6), (0.5, -0.1)],
)
def test_in_the_engine_what_loses_is_off_within_200_steps_and_what_wins_is_on(
    lookahead: float, straight: float
) -> None:
    model = decoded(lookahead, straight, SOON)
    assert model.on == {"lookahead": lookahead < 0, "straight_reads": straight < 0}


def test_in_the_engine_a_step_costs_nothing_more_while_nothing_is_tried() -> None:
    """Between two trials nothing is switched, and each step runs the layers that it has, once."""
    model = decoded(0.2, -0.2, 2000)
    last = max(model.switched_at)
    assert last <= SOON, "both are decided, and the next trial is far away"
    assert len(model.forwards) - last > 1700
    assert model.num_layers_run == model.num_layers * len(model.forwards)


def test_in_the_engine_prompts_beside_an_answer_put_a_trial_off() -> None:
    model = decoded(0.3, -0.3, 150, arrivals=[3.0 * n for n in range(40)])
    assert model.on == {"lookahead": True, "straight_reads": True}, "no trial was ever undisturbed"
