"""The width of the decode batch: found by measurement, within 5 % of the best, and found again."""

import random
from collections.abc import Callable

import pytest

from server.engine.limits import Limits
from server.engine.width import Width
from tests.server.engine.driven import TimedModel, World, answer, ask

StepTime = Callable[[int], float]

CURVES: dict[str, StepTime] = {
    "bytes only: all widths are the same": lambda width: 1.0 * width,
    "compute only: the wider the better": lambda width: 1.0,
    "a cache that holds two working sets": lambda width: 0.2 + (0.1 if width <= 2 else 0.5) * width,
    "a cache that holds four": lambda width: 0.4 + (0.1 if width <= 4 else 0.4) * width,
    "each costs more than the one before": lambda width: 0.1 * width**1.7,
}


def rate(step_s: StepTime, width: int) -> float:
    return width / step_s(width)


def run(width: Width, step_s: StepTime, num_steps: int, num_decoding: int = 8, noise: float = 0.1) -> int:
    rng = random.Random(5)
    for _ in range(num_steps):
        rows = width.choose(num_decoding)
        width.note(rows, step_s(rows) * rng.uniform(1 - noise, 1 + noise))
    return width.chosen


@pytest.mark.parametrize("name", CURVES)
def test_the_choice_is_within_5_percent_of_the_best(name: str) -> None:
    step_s = CURVES[name]
    best = max(rate(step_s, width) for width in range(1, 9))
    chosen = run(Width(8, None, adapts=True), step_s, 1500)
    assert rate(step_s, chosen) >= 0.95 * best


def test_it_is_found_again_when_the_conversations_change() -> None:
    width = Width(8, None, adapts=True)
    assert run(width, CURVES["each costs more than the one before"], 1500) == 1
    assert run(width, CURVES["compute only: the wider the better"], 6000) == 8


def test_trials_become_seldom_where_nothing_better_is_found() -> None:
    width, others = Width(8, None, adapts=True), 0
    for _ in range(10_000):
        rows = width.choose(8)
        others += rows != 8
        width.note(rows, 1.0)
    assert others / 10_000 < 0.05


def test_fewer_that_decode_are_all_taken() -> None:
    width = Width(8, None, adapts=True)
    assert width.choose(3) == 3
    assert run(width, CURVES["compute only: the wider the better"], 1500, num_decoding=3) >= 3


@pytest.mark.parametrize(("fixed", "adapts", "expected"), [(3, True, 3), (3, False, 3), (None, False, 8)])
def test_it_can_be_fixed_and_is_everything_where_experts_are_resident(
    fixed: int | None, adapts: bool, expected: int
) -> None:
    width = Width(8, fixed, adapts=adapts)
    run(width, CURVES["each costs more than the one before"], 500)
    assert width.choose(8) == expected
    assert width.rates == {}


def test_the_loop_narrows_its_steps_where_that_is_faster_and_all_still_finish() -> None:
    world = World()
    model = TimedModel(world=world, num_layers=2, cost=lambda rows: 0.01 * rows**2)
    world.at(0, *(ask(name, 2, 150) for name in "abcdefgh"))
    loop = world.run(model, limits=Limits(is_streaming=True))
    assert all(world.tokens_of(name) == answer(2, 150) for name in "abcdefgh")
    assert loop.measure()["batch_width"] < 8
    assert loop.measure()["decode_rate.8"] > 0
