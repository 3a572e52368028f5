"""What the last day was like, minute by minute, for the page. A sink of `Watch`."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from server.api.watch.record import RequestRecord

MINUTES = 24 * 60


@dataclass
class Minute:
    """Sums of the requests that ended in one minute."""

    minute: int  # since 1970
    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_s: float = 0.0
    firsts: int = 0  # requests with a first token
    hits: float = 0.0
    asked: float = 0.0
    read_bytes: float = 0.0
    dollars: float = 0.0


class History:
    """The minutes of the last day that had requests."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._minutes: deque[Minute] = deque()
        self._before: dict[str, float] = {}

    def __call__(self, record: RequestRecord) -> None:
        """Adds a request that is over."""
        if not record.is_generation:
            return
        now, used = self._now(), record.tokens
        now.requests += 1
        now.failed += record.status >= 400 or bool(record.reason)
        now.prompt_tokens += used.num_prompt_tokens
        now.cached_tokens += used.num_cached_tokens
        now.new_tokens += used.num_completion_tokens
        now.dollars += record.cost
        if record.first_s is not None:
            now.first_s, now.firsts = now.first_s + record.first_s, now.firsts + 1
        hits = self._since(record, "hits")
        missed = self._since(record, "misses") + self._since(record, "ahead_used")
        now.hits, now.asked = now.hits + hits, now.asked + hits + missed
        now.read_bytes += self._since(record, "device_bytes")

    def minutes(self, count: int = MINUTES) -> list[dict[str, Any]]:
        """Those of the last `count` minutes that had requests, the oldest first."""
        first = int(self._clock() / 60) - count
        return [asdict(one) for one in self._minutes if one.minute > first]

    def _now(self) -> Minute:
        minute = int(self._clock() / 60)
        if not self._minutes or self._minutes[-1].minute != minute:
            self._minutes.append(Minute(minute))
            while self._minutes[0].minute <= minute - MINUTES:
                self._minutes.popleft()
        return self._minutes[-1]

    def _since(self, record: RequestRecord, name: str) -> float:
        """What the engine has counted since a request ended last; after a restart it counts from 0."""
        total = record.stats_after.get(name, 0.0)
        before = self._before.get(name, record.stats_before.get(name, 0.0))
        self._before[name] = total
        return total - before if total >= before else total
