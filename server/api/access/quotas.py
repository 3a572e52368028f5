"""How much each key may use in a minute and in a day, and how much it has used.

`Quota` is what the key file says; `Accounts` counts, by account, so that reading the file again forgets
nothing, and keeps the counts in a file where there is one. Windows are those of the clock (UTC): a minute
from :00 to :59, a day from midnight. Tokens are set aside when a request is accepted, and counted when it is
over: requests that come together share what is left.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from config.errors import MAX_RETRY_AFTER_S, RequestError, UsageError
from server.api.sqlite_file import SqliteFile

PERIODS_S: Mapping[str, int] = {"minute": 60, "day": 86_400}
UNITS = ("requests", "tokens")
# Python refuses to read thousands of digits with an error of its own.
MAX_DIGITS = 18
# Tokens that are set aside for an answer whose request states no limit, or fewer where fewer are left.
UNSTATED_TOKENS = 4096
# Between setting tokens aside and the start of a response lies no more; a client that left then is forgotten.
START_S = 5.0
# Two servers may keep their counts in one file, so each adds.
TABLE = "CREATE TABLE IF NOT EXISTS used (period, turn, name, amount, PRIMARY KEY (period, turn, name))"
ADD = (
    "INSERT INTO used VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET amount = MAX(0, amount + excluded.amount)"
)
LIMITS = tuple(f"{unit}/{period}" for unit in UNITS for period in PERIODS_S)


RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{unit}" for unit in UNITS for what in ("limit", "remaining", "reset")
)


@dataclass(frozen=True)
class Quota:
    """The limits of one key by their names in `LIMITS`; what is absent is not limited."""

    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Spent:
    """A limit that is used up, and in how many seconds there is more."""

    limit: str
    amount: int
    wait_s: int


class QuotaError(RequestError):
    """A key has too few tokens for a request; more in `wait_s` seconds, or with None never."""

    def __init__(self, message: str, wait_s: int | None) -> None:
        super().__init__(message, status=429, error_type="rate_limit_exceeded")
        self.retry_after_s = min(wait_s or MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S)
        self.can_retry = wait_s is not None and wait_s <= MAX_RETRY_AFTER_S


@dataclass(frozen=True)
class Wanted:
    """Tokens of one request: those that must be left for it, and those that it may take."""

    needed: int
    most: int


@dataclass(frozen=True)
class _Reserved:
    name: str
    tokens: int
    ends_at: float  # without a start; a response that has started ends by itself


def parse_quota(words: Iterable[str]) -> Quota:
    """A quota from words such as tokens/day=2000000. Raises UsageError."""
    limits = {}
    for word in words:
        name, _, amount = word.partition("=")
        is_number = amount.isascii() and amount.isdigit() and len(amount) <= MAX_DIGITS
        if name not in LIMITS or not (is_number and int(amount)):
            raise UsageError(
                f"{word[:60]!r} is no limit; one is NAME=NUMBER, of the names {', '.join(LIMITS)}; beside "
                "limits there are admin and cache_group=NAME"
            )
        limits[name] = int(amount)
    return Quota(limits)


class Accounts:
    """What each account has used in the current windows."""

    def __init__(self, clock: Callable[[], float] = time.time, file: SqliteFile | None = None) -> None:
        """Goes on from the counts in `file`, whose table is `TABLE`."""
        self._clock = clock
        self._windows: dict[str, int] = {}
        self._used: dict[str, Counter[str]] = {period: Counter() for period in PERIODS_S}
        self._reserved: dict[str, _Reserved] = {}
        self._lock = threading.RLock()
        self._file = file
        self._turn()
        for period, window, name, amount in file.rows("SELECT * FROM used") if file else ():
            if self._windows.get(period) == window:
                self._used[period][name] = amount

    def admit(self, name: str, quota: Quota) -> Spent | None:
        """Count a request, or say which limit is used up."""
        with self._lock:
            for limit, amount in quota.limits.items():
                if self.used(name, limit) >= amount:
                    return Spent(limit, amount, self._wait_s(limit))
            self._add(name, "requests", 1)
        return None

    def reserve(self, name: str, quota: Quota, request_id: str, wanted: Wanted) -> None:
        """Set tokens aside for a request that was admitted. Raises QuotaError, and takes back its count."""
        with self._lock:
            now = self._clock()
            for other in [key for key, one in self._reserved.items() if one.ends_at < now]:
                del self._reserved[other]
            limits = {limit: most for limit, most in quota.limits.items() if limit.startswith("tokens/")}
            left = [most - self._taken(name, limit) for limit, most in limits.items()]
            for (limit, most), rest in zip(limits.items(), left, strict=True):
                if wanted.needed > rest:
                    self._add(name, "requests", -1)
                    raise self._too_few(name, limit, most, wanted.needed)
            tokens = min([wanted.most, *left])
            self._reserved[request_id] = _Reserved(name, tokens, now + START_S)

    def start(self, request_id: str) -> None:
        """Keep what was set aside until the request is charged: its response has started."""
        with self._lock:
            if found := self._reserved.get(request_id):
                self._reserved[request_id] = replace(found, ends_at=math.inf)

    def charge(self, name: str, num_tokens: int, request_id: str = "") -> None:
        """Count the tokens of a request that is over, in the place of those that were set aside."""
        with self._lock:
            self._reserved.pop(request_id, None)
            self._add(name, "tokens", num_tokens)

    def used(self, name: str, limit: str) -> int:
        """How much of a limit is used."""
        with self._lock:
            self._turn()
            unit, _, period = limit.partition("/")
            return self._used[period][f"{unit} {name}"]

    def reserved(self, name: str) -> int:
        """Tokens that are set aside for requests under way."""
        with self._lock:
            return sum(one.tokens for one in self._reserved.values() if one.name == name)

    def _too_few(self, name: str, limit: str, most: int, needed: int) -> QuotaError:
        asked = f"the request may take {needed} tokens, prompt and stated limit of the answer together"
        if needed > most:
            message = f"{asked}, and the key has {most} {limit}: state a lower limit"
            return QuotaError(message, None)
        wait_s = self._wait_s(limit)
        if needed <= most - self.used(name, limit):  # others under way may take less than they stated
            wait_s = min(wait_s, math.ceil(START_S))
        message = f"{asked}, and the key has fewer left of its {most} {limit}"
        return QuotaError(f"{message}; there may be more in {wait_s} s", wait_s)

    def headers(self, name: str, quota: Quota) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI's clients read them: of each unit the limit of which least is left."""
        told = {}
        with self._lock:
            for unit in UNITS:
                limits = [limit for limit in quota.limits if limit.startswith(unit)]
                left = {limit: max(0, quota.limits[limit] - self._taken(name, limit)) for limit in limits}
                if limits:
                    limit = min(limits, key=left.__getitem__)
                    told[f"x-ratelimit-limit-{unit}"] = str(quota.limits[limit])
                    told[f"x-ratelimit-remaining-{unit}"] = str(left[limit])
                    told[f"x-ratelimit-reset-{unit}"] = f"{self._wait_s(limit)}s"
        return told

    def _taken(self, name: str, limit: str) -> int:
        """What is used of a limit, and what is set aside."""
        return self.used(name, limit) + (self.reserved(name) if limit.startswith("tokens/") else 0)

    def _add(self, name: str, unit: str, amount: int) -> None:
        self._turn()
        for period, used in self._used.items():
            counted = f"{unit} {name}"
            used[counted] = max(0, used[counted] + amount)
            if self._file:
                self._file.write(ADD, period, self._windows[period], counted, amount)

    def _turn(self) -> None:
        """Begin new windows where the clock says so."""
        for period, seconds in PERIODS_S.items():
            window = int(self._clock() // seconds)
            if self._windows.get(period) != window:
                self._windows[period] = window
                self._used[period].clear()
                if self._file:
                    self._file.write("DELETE FROM used WHERE period = ? AND turn < ?", period, window)

    def _wait_s(self, limit: str) -> int:
        seconds = PERIODS_S[limit.partition("/")[2]]
        return math.ceil(seconds - self._clock() % seconds)
