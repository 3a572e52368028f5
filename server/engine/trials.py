"""Habits whose worth depends on the machine, tried on live steps. Owned by the engine's loop.

Reading ahead, and reading straight into slots, gain on one machine and lose on another, and peers that run on
Macs gave both up. So each habit is tried: blocks of decode steps with it and without it by turns, in pairs,
the first step of each block not counted. It is kept only where the mean gain of the pairs is above its
spread, two standard errors. Then nothing is tried for long. No habit changes what is computed.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

# A pair is two blocks. A trial of all pairs takes 64 steps, so that two habits are decided in 150.
BLOCK_STEPS = 4
PAIRS = 8
ERRORS = 2.0
FIRST_STEPS = 16
# Steps between two rounds of trials: at first, and at most; twice as many after each.
FIRST_PAUSE, LONGEST_PAUSE = 4096, 65_536

log = logging.getLogger(__name__)


@dataclass
class Habit:
    """Something that is done or not. `switch` does it from the next step on; `fixed` leaves no choice."""

    name: str
    switch: Callable[[bool], None]
    fixed: bool | None = None
    is_on: bool = True
    gain: float | None = None  # share of a step's time that it saved when it was tried last
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.fixed is not None:
            self.take(self.fixed)

    def take(self, is_on: bool) -> None:
        """Does it from now on, or does not."""
        self.is_on = is_on
        self.switch(is_on)


@dataclass
class Trials:
    """`note` after each undisturbed decode step; tries one habit at a time, in turn."""

    habits: Sequence[Habit] = ()
    _left: int = FIRST_STEPS  # steps until the next trial, or of the block under way
    _pause: int = FIRST_PAUSE
    _rows: int = 0  # of each step of the trial under way
    _seconds: list[float] = field(default_factory=list)  # of the block under way
    _blocks: list[float] = field(default_factory=list)  # medians of the trial: on, off, off, on, ...
    _tried: Habit | None = None

    def __post_init__(self) -> None:
        self._open = [habit for habit in self.habits if habit.fixed is None]
        self._turn = 0  # whose trial is next

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long, and nothing else ran beside it."""
        if not self._open:
            return
        self._left -= 1
        if self._tried is not None:
            self._note_tried(self._tried, rows, seconds)
        elif self._left <= 0:
            self._begin(self._open[self._turn], rows)

    def disturb(self) -> None:
        """A prompt was read, or other answers go forward: the trial under way is put off."""
        if self._tried is not None:
            self._tried.take(self._tried.is_on)
            self._tried, self._left = None, FIRST_STEPS

    def measure(self) -> dict[str, float]:
        """What is done, and what that gained when it was tried last, for /metrics."""
        values = {f"habit.{habit.name}": float(habit.is_on) for habit in self.habits}
        return values | {
            f"habit_gain.{habit.name}": habit.gain for habit in self.habits if habit.gain is not None
        }

    def _begin(self, habit: Habit, rows: int) -> None:
        self._tried, self._rows, self._blocks = habit, rows, []
        self._begin_block(habit)

    def _begin_block(self, habit: Habit) -> None:
        """On, off, off, on, and so on: what drifts meets both alike."""
        number = len(self._blocks)
        habit.switch(number % 4 in (0, 3))
        self._seconds, self._left = [], BLOCK_STEPS

    def _note_tried(self, habit: Habit, rows: int, seconds: float) -> None:
        if rows != self._rows:
            self.disturb()
            return
        self._seconds.append(seconds)
        if self._left > 0:
            return
        self._blocks.append(median(self._seconds[1:]))
        if len(self._blocks) < 2 * PAIRS:
            self._begin_block(habit)
        else:
            self._decide(habit)

    def _decide(self, habit: Habit) -> None:
        pairs = list(zip(self._blocks[::2], self._blocks[1::2], strict=True))
        gains = [(b - a if i % 2 == 0 else a - b) for i, (a, b) in enumerate(pairs)]
        whole = fmean(self._blocks)
        habit.gain = fmean(gains) / whole
        habit.spread = ERRORS * stdev(gains) / len(gains) ** 0.5 / whole
        habit.take(habit.gain > habit.spread)
        log.info(
            "%s is %s: it saved %.1f %% of a step's %.0f ms, spread %.1f, over %d pairs of %d steps",
            habit.name, "on" if habit.is_on else "off", 100 * habit.gain, 1e3 * whole,
            100 * habit.spread, PAIRS, BLOCK_STEPS,
        )  # fmt: skip
        self._tried = None
        self._left = FIRST_STEPS
        self._turn = (self._turn + 1) % len(self._open)
        if self._turn == 0:
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
