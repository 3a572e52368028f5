"""A clock that moves when somebody sleeps or waits for a read, and a reader whose threads are its events.

Everything runs on one thread. `install` puts the clock in the place of `time.monotonic` and `time.sleep`; it
is called before the product is imported, which keeps references to them.
"""

import heapq
import itertools
import time
from collections.abc import Callable
from functools import partial


class Clock:
    """Simulated seconds, and what happens at which of them."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """In the place of `time.monotonic`."""
        return self._now_s

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Has something happen at this second, or now if that has passed."""
        heapq.heappush(self._events, (max(when_s, self._now_s), next(self._order), act))

    def sleep(self, seconds: float) -> None:
        """In the place of `time.sleep`: what is due meanwhile happens."""
        until_s = self._now_s + max(0.0, seconds)
        while self._events and self._events[0][0] <= until_s:
            self.step()
        self._now_s = until_s

    def step(self) -> None:
        """Moves to what happens next, and lets it happen."""
        when_s, _, act = heapq.heappop(self._events)
        self._now_s = when_s
        act()

    def install(self) -> None:
        """Everything that is imported from now on lives in this time."""
        vars(time).update(monotonic=self.now, sleep=self.sleep)


def install_reader(clock: Clock, counts_alignment: bool, wake_s: float) -> None:
    """Stores that are made from now on read by events of the clock, from a `SimulatedDisk`.

    `wake_s`: from a read's end until whoever waits for it goes on.
    """
    import streaming.fills as fills
    from benchmarks.simulator.clocked_reader import ClockedReader

    vars(fills)["Reader"] = partial(ClockedReader, clock, counts_alignment, wake_s)
