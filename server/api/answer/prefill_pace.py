"""How fast a prompt is read, and so how long the rest of it will take. One `PrefillPace` for each answer."""

import math
import time
from collections.abc import Callable


class PrefillPace:
    """Keeps the first count and the last. Between two counts the estimate falls with the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    def note(self, num_done: int) -> None:
        """So many tokens have been read by now. A count that falls begins anew."""
        now = self._clock(), num_done
        if self._first is None or self._last is None or num_done < self._last[1]:
            self._first = self._last = now
        elif num_done > self._last[1]:
            self._last = now

    def eta_s(self, num_tokens: int) -> int | None:
        """Seconds until `num_tokens` have been read, at least 1; None before there is a rate."""
        if self._first is None or self._last is None or self._last[1] <= self._first[1]:
            return None
        seconds_a_token = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        rest_s = seconds_a_token * (num_tokens - self._last[1]) - (self._clock() - self._last[0])
        return max(1, math.ceil(rest_s))
