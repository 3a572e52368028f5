"""How much each key may use in a minute and in a day, and how much it has used.

`Quota` is what the key file says; `Accounts` counts, by the name of the key, so that reading the file again
forgets nothing. Windows are those of the clock (UTC): a minute from :00 to :59, a day from midnight.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from config.errors import UsageError

PERIODS_S: Mapping[str, int] = {"minute": 60, "day": 86_400}
UNITS = ("requests", "tokens")
# Python refuses to read thousands of digits with an error of its own.
MAX_DIGITS = 18
LIMITS = tuple(f"{unit}/{period}" for unit in UNITS for period in PERIODS_S)


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


def parse_quota(words: Iterable[str]) -> Quota:
    """A quota from words such as tokens/day=2000000. Raises UsageError."""
    limits = {}
    for word in words:
        name, _, amount = word.partition("=")
        is_number = amount.isascii() and amount.isdigit() and len(amount) <= MAX_DIGITS
        if name not in LIMITS or not (is_number and int(amount)):
            raise UsageError(
                f"{word[:60]!r} is no limit; one is NAME=NUMBER, of the names {', '.join(LIMITS)}"
            )
        limits[name] = int(amount)
    return Quota(limits)


class Accounts:
    """What each name has used in the current windows."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._windows: dict[str, int] = {}
        self._used: dict[str, Counter[str]] = {period: Counter() for period in PERIODS_S}

    def admit(self, name: str, quota: Quota) -> Spent | None:
        """Count a request, or say which limit is used up."""
        self._turn()
        for limit, amount in quota.limits.items():
            if self.used(name, limit) >= amount:
                return Spent(limit, amount, self._wait_s(limit))
        self._add(name, "requests", 1)
        return None

    def charge(self, name: str, num_tokens: int) -> None:
        """Count the tokens of a request that is over."""
        self._turn()
        self._add(name, "tokens", num_tokens)

    def used(self, name: str, limit: str) -> int:
        """How much of a limit is used."""
        self._turn()
        unit, _, period = limit.partition("/")
        return self._used[period][f"{unit} {name}"]

    def _add(self, name: str, unit: str, amount: int) -> None:
        for used in self._used.values():
            used[f"{unit} {name}"] += amount

    def _turn(self) -> None:
        """Begin new windows where the clock says so."""
        for period, seconds in PERIODS_S.items():
            window = int(self._clock() // seconds)
            if self._windows.get(period) != window:
                self._windows[period] = window
                self._used[period].clear()

    def _wait_s(self, limit: str) -> int:
        seconds = PERIODS_S[limit.partition("/")[2]]
        return math.ceil(seconds - self._clock() % seconds)
