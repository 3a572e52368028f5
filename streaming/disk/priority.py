"""How many reads that nobody waits for yet may be with the disk while somebody does wait for others.

A queue with classes is of no use to a read that finds the disk busy with what was taken out of it before: a
disk that serves one after the other makes it wait for all of that. So for a while after each read that was
waited for, sweeps have only a few at a time. Owned by the reader, called under its lock.
"""

import time
from collections.abc import Callable

from streaming.disk.reads import ReadClass

# As long as a layer of a decode step may compute before it asks for the next experts. A sweep has its full
# depth again for most of the time between two steps.
RECENT_S = 0.3


class Precedence:
    """Of a reader with so many threads."""

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        # Two keep a disk busy that serves one at a time.
        self._most, self._clock = max(2, num_threads // 4), clock
        self._num_background = 0
        self._last_demand_s = -RECENT_S

    def note(self, read_class: ReadClass) -> None:
        """A read of this class was asked for, hastened, or came back."""
        if read_class == ReadClass.DEMAND:
            self._last_demand_s = self._clock()

    def pause_s(self, read_class: ReadClass) -> float:
        """How long a read of this class waits unless another ends before; 0: it may start."""
        if read_class < ReadClass.SWEEP or self._num_background < self._most:
            return 0.0
        return max(0.0, self._last_demand_s + RECENT_S - self._clock())

    def start(self, read_class: ReadClass) -> bool:
        """A read starts; whether it counts, so that its end must be told."""
        counts = read_class >= ReadClass.SWEEP
        self._num_background += counts
        return counts

    def end(self) -> None:
        """A read that counted ended, or was given up."""
        self._num_background -= 1
