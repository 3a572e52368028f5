"""A few threads for the work of many clients: next is the holder that had the least time lately.

A `Lane` belongs to the event loop. What runs in it is asked now and then whether anybody still wants it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from heapq import heappop, heappush
from time import monotonic
from typing import TypeVar

from server.api.error_bodies import ClientGone

# How far back the time that a holder has used counts.
MEMORY_S = 30.0
# So much too early an event loop may call.
TIMER_S = 0.001

T = TypeVar("T")


class Presence:
    """Tells work whether its client is still there."""

    def __init__(self) -> None:
        self._is_over = False

    def withdraw(self) -> None:
        """The client is gone."""
        self._is_over = True

    def check(self) -> None:
        """Raise ClientGone where nobody wants the result."""
        if self._is_over:
            raise ClientGone


class Sluice:
    """Lets a few of those that wait through at a time, then nobody for a while: others come in between."""

    def __init__(self, num_at_once: int, pause_s: float = 0.0) -> None:
        self._num_at_once, self._pause_s = num_at_once, pause_s
        self._line: deque[asyncio.Future[None]] = deque()
        self._opens_at = 0.0

    async def pass_through(self) -> None:
        """Wait for a place."""
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        self._line.append(place)
        if len(self._line) == 1:
            loop.call_at(max(loop.time(), self._opens_at), self._open, loop)
        await place

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        for place in [self._line.popleft() for _ in range(min(self._num_at_once, len(self._line)))]:
            if not place.done():  # its client may have gone
                place.set_result(None)
        self._opens_at = loop.time() + self._pause_s
        if self._line:
            loop.call_at(self._opens_at, self._open, loop)


class Turns:
    """Gives a number of places to holders, which may come many times.

    A place that is given back stays empty for `rest` times as long as it was used, and at most `max_rest_s`.
    """

    def __init__(
        self,
        num_places: int,
        clock: Callable[[], float] = monotonic,
        *,
        rest: float = 0.0,
        max_rest_s: float = 0.0,
    ) -> None:
        self._num_free, self._clock = num_places, clock
        self._rest, self._max_rest_s = rest, max_rest_s
        self._rests_until: list[float] = []  # a heap, by the event loop's clock
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self._paid_until: dict[str, float] = {}  # a holder's time begins `MEMORY_S` ago and grows with use

    @asynccontextmanager
    async def turn(self, holder: str) -> AsyncGenerator[None, None]:
        """Wait for a place, and give it back at the end."""
        await self._enter(holder)
        started_at = self._clock()
        try:
            yield
        finally:
            now = self._clock()
            used_s = now - started_at
            self._paid_until[holder] = self._age(holder, now) + used_s
            if rest_s := min(self._rest * used_s, self._max_rest_s):
                loop = asyncio.get_running_loop()
                heappush(self._rests_until, loop.time() + rest_s)
                loop.call_later(rest_s, self._end_rests, loop)
            else:
                self._pass_on()

    async def _enter(self, holder: str) -> None:
        loop = asyncio.get_running_loop()
        self._end_rests(loop)
        if self._num_free:
            self._num_free -= 1
            return
        place = loop.create_future()
        line = self._lines.setdefault(holder, deque())
        line.append(place)
        if self._rests_until:  # the loop that was to end this rest may have ended itself
            loop.call_at(self._rests_until[0], self._end_rests, loop)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._pass_on()  # it came at the same moment
            else:
                line.remove(place)
            raise

    def _end_rests(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._rests_until and self._rests_until[0] <= loop.time() + TIMER_S:
            heappop(self._rests_until)
            self._pass_on()

    def _pass_on(self) -> None:
        now = self._clock()
        waiting = {holder: line for holder, line in self._lines.items() if line}
        self._lines = waiting
        self._paid_until = {name: end for name, end in self._paid_until.items() if end > now - MEMORY_S}
        if waiting:
            holder = min(waiting, key=lambda name: self._age(name, now))
            waiting[holder].popleft().set_result(None)
        else:
            self._num_free += 1

    def _age(self, holder: str, now: float) -> float:
        return max(self._paid_until.get(holder, 0.0), now - MEMORY_S)


class Lane:
    """Threads that work for one request each, and rest after it as `Turns` says."""

    def __init__(self, num_threads: int, name: str, rest: float = 0.0, max_rest_s: float = 0.0) -> None:
        self._turns = Turns(num_threads, rest=rest, max_rest_s=max_rest_s)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def submit(self, work: Callable[[], None]) -> None:
        """Do something for nobody in particular, in no turn."""
        self._pool.submit(work)

    async def run(self, holder: str, work: Callable[[Presence], T]) -> T:
        """What `work` returns or raises. Cancelled, it waits until the thread has noticed."""
        async with self._turns.turn(holder):
            wanted = Presence()
            future = asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, work, wanted)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                wanted.withdraw()
                await asyncio.wait([future])
                future.exception()  # seen: nobody else asks for it
                raise
