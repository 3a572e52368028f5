"""The line of requests that wait for the engine, as the HTTP side sees it: its length, and how fast it moves.

Owned by `EngineProcess`. Places are asked for on the threads that render prompts, so there is a lock.
"""

import math
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from config.errors import MAX_RETRY_AFTER_S, RETRY_AFTER_S, BusyError

# Between asking for a place and entering the line lies the start of a response, no more.
RESERVATION_S = 5.0
# Weight of the last wait between two starts in their running mean.
FRESHNESS = 0.2


class AdmissionLine:
    """Requests that have been sent to the engine and have not started."""

    def __init__(self, max_waiting: int, clock: Callable[[], float] = monotonic) -> None:
        self._max_waiting, self._clock = max_waiting, clock
        self._lock = threading.Lock()
        self._reserved: deque[float] = deque()  # when each reservation ends
        self._waiting: set[str] = set()
        self._moved_s: float | None = None  # when somebody started last, while others waited
        self._interval_s: float | None = None

    def reserve(self) -> None:
        """Keep a place for a request that enters at once. Raises BusyError when all are taken."""
        with self._lock:
            now_s = self._clock()
            while self._reserved and self._reserved[0] <= now_s:
                self._reserved.popleft()
            if len(self._waiting) + len(self._reserved) >= self._max_waiting:
                retry_after_s = self._retry_after_s()
                raise BusyError(
                    f"{self._max_waiting} requests wait already; try again in {retry_after_s} s",
                    retry_after_s,
                )
            self._reserved.append(now_s + RESERVATION_S)

    def enter(self, request_id: str) -> None:
        """A request goes to the engine. Further answers to one request come without a place of their own."""
        with self._lock:
            if self._reserved:
                self._reserved.popleft()
            if not self._waiting:
                self._moved_s = self._clock()
            self._waiting.add(request_id)

    def start(self, request_id: str) -> None:
        """The engine works on it."""
        with self._lock:
            if request_id not in self._waiting:
                return
            self._waiting.remove(request_id)
            now_s = self._clock()
            if self._moved_s is not None:
                waited_s = now_s - self._moved_s
                mean_s = waited_s if self._interval_s is None else self._interval_s
                self._interval_s = mean_s + FRESHNESS * (waited_s - mean_s)
            self._moved_s = now_s

    def leave(self, request_id: str) -> None:
        """It is over, whether it has started or not."""
        with self._lock:
            self._waiting.discard(request_id)

    def is_waiting(self, request_id: str) -> bool:
        """Whether it has entered and not started."""
        return request_id in self._waiting

    @property
    def num_waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def retry_after_s(self) -> int:
        """By then, at the speed that was measured, all that wait now will have started."""
        with self._lock:
            return self._retry_after_s()

    def _retry_after_s(self) -> int:
        if self._interval_s is None or self._moved_s is None:
            return RETRY_AFTER_S
        interval_s = max(self._interval_s, self._clock() - self._moved_s if self._waiting else 0.0)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(interval_s * (len(self._waiting) + 1))))
