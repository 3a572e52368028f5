"""Habits are kept where they pay on this machine, and cost nothing while nothing is tried."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.attention.attention import Span
from server.engine.trials import FIRST_PAUSE, LONGEST_PAUSE, Habit, Trials
from tests.checkpoints import open_model, save_packed
from tests.models.make_golden import SEED
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
