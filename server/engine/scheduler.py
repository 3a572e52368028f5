"""Chooses who runs next. Owns the waiting and the running; called by the engine's thread only.

One sequence runs at a time, first come, first served.
"""

from collections import deque
from dataclasses import dataclass

from config.plan import MIN_SWEEP_TOKENS
from server.engine.sequence import Sequence


@dataclass(frozen=True)
class Prefill:
    """Read the next `num_rows` tokens of a prompt."""

    sequence: Sequence
    num_rows: int


@dataclass(frozen=True)
class Decode:
    """One more token for a sequence whose prompt has been read."""

    sequence: Sequence


Work = Prefill | Decode


class Scheduler:
    """A queue and the sequence at its head."""

    def __init__(self, prefill_rows: int = MIN_SWEEP_TOKENS) -> None:
        self._prefill_rows = prefill_rows
        self._waiting: deque[Sequence] = deque()
        self._running: Sequence | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a sequence. A running one is only marked: its step may be under way."""
        self._waiting = deque(item for item in self._waiting if item.request.request_id != request_id)
        if self._running and self._running.request.request_id == request_id:
            self._running.is_cancelled = True

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence that is complete, failed or cancelled."""
        if self._running is sequence:
            self._running = None

    def choose(self) -> Work | None:
        """The next piece of work, or None when nobody waits."""
        if self._running and self._running.is_cancelled:
            self._running = None
        if self._running is None and self._waiting:
            self._running = self._waiting.popleft()
        if self._running is None:
            return None
        if self._running.num_unread:
            return Prefill(self._running, min(self._running.num_unread, self._prefill_rows))
        return Decode(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs or waits."""
        return self._running is None and not self._waiting
