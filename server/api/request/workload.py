"""What requests may have before the engine gets them: bytes, by a line of the memory plan, and threads.

One `Workload` for each service. Each request has an `Allowance`, from its first byte on.
"""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from config.errors import BusyError, RequestError
from config.plan import MIN_REQUEST_BYTES
from server.api.request.turns import Lane, Presence, Sluice
from server.heap import trim_heap

# Bodies up to this size are read between two steps of the event loop, and never wait behind larger ones.
SMALL_BYTES = 64 * 2**10
# After a body of this size much is free that the C library would keep.
LARGE_BYTES = 2**20
# Of all bytes, bodies that are not complete may have this part; clients can hold on to them for long.
INCOMPLETE = 0.5
# One that has come for so long is given up for another.
GRACE_S = 10.0
RETRY_AFTER_S = 5
# Parts of large bodies that are read at once, of 256 kB at most, and the pause after them: 50 MB a second,
# which one client can have alone. Without it bodies take the event loop and a processor for themselves.
PARTS_AT_ONCE, PARTS_PAUSE_S = 1, 0.005
# After work on a large body the next one waits for so many times as long, and at most for so long. While one
# is worked on, each of the event loop's system calls waits for the interpreter.
REST, MAX_REST_S = 2.0, 1.0

# Answers to so many bytes of prompts are about as much work as each answer.
PART_BYTES = 2**10

T = TypeVar("T")


class Workload:
    """The account of all requests. Work is done on threads, so there is a lock."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.limit: Callable[[], int] = lambda: MIN_REQUEST_BYTES
        self._clock = clock
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._incomplete: dict[Allowance, float] = {}  # since when; the oldest first
        self.sluice = Sluice(PARTS_AT_ONCE, PARTS_PAUSE_S)
        self._quick, self._slow = Lane(2, "requests"), Lane(1, "large-requests", REST, MAX_REST_S)

    def lease(self) -> "Allowance":
        """For a new request."""
        return Allowance(self)

    @property
    def num_bytes(self) -> int:
        """Bytes that all requests have now."""
        return self._num_bytes

    def lane(self, num_bytes: int) -> Lane:
        """Where a body of this size is worked on."""
        return self._quick if num_bytes <= SMALL_BYTES else self._slow

    def tidy_up(self) -> None:
        """Give memory back to the system, once nothing large is worked on."""
        self._slow.submit(trim_heap)

    def take(self, lease: "Allowance", num_bytes: int) -> None:
        """Change what a lease has. Raises BusyError where there is no room now, RequestError where never."""
        if num_bytes > max(self.limit(), SMALL_BYTES):
            message = (
                f"the request would take {num_bytes // 10**6} MB of memory, of "
                f"{self.limit() // 10**6} MB that all requests together have"
            )
            raise RequestError(message, status=413, error_type="payload_too_large")
        with self._lock:
            more = num_bytes - lease.num_bytes
            if more > 0 and num_bytes > SMALL_BYTES and self._num_bytes + more > self.limit():
                raise _busy()
            self._num_bytes += more
            lease.num_bytes = num_bytes

    def receive(self, lease: "Allowance", num_bytes: int) -> None:
        """So much of a body has come. Raises BusyError where it is not wanted any more."""
        now = self._clock()
        self._incomplete.setdefault(lease, now)
        others = sum(one.num_bytes for one in self._incomplete if one is not lease)
        if others and num_bytes > SMALL_BYTES and others + num_bytes > INCOMPLETE * self.limit():
            oldest, since = next(iter(self._incomplete.items()))
            if oldest is lease or now - since < GRACE_S:
                raise _busy()
            self.complete(oldest)
            oldest.give_up()
        self.take(lease, num_bytes)

    def complete(self, lease: "Allowance") -> None:
        """The body is complete, or will never be."""
        self._incomplete.pop(lease, None)


class Allowance:
    """What one request has. Belongs to the event loop, but for `hold`."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._size = 0  # of the body, as it came
        self.num_bytes = 0
        self.kept_bytes = 0  # of the parsed body
        self.give_up: Callable[[], None] = lambda: None  # ends the wait for the rest of the body

    def receive(self, num_bytes: int) -> None:
        """So much of the body has come. Raises BusyError."""
        self._size = num_bytes
        self._workload.receive(self, num_bytes)

    async def await_more(self) -> None:
        """Returns when more of the body may come: of large ones a few parts in each round of the loop."""
        if not self.is_small:
            await self._workload.sluice.pass_through()

    def complete(self) -> None:
        """All of the body has come, or no more of it is wanted."""
        self._workload.complete(self)

    def hold(self, num_bytes: int) -> None:
        """Have so many bytes from now on. Raises BusyError; may be called by any thread."""
        self._workload.take(self, num_bytes)

    def release(self) -> None:
        """The request is over."""
        self.complete()
        self.hold(0)
        if self._size > LARGE_BYTES:
            self._workload.tidy_up()

    async def run(self, holder: str, work: Callable[[Presence], T], num_parts: int = 1) -> T:
        """The result of work for this request, done on a thread when it is the holder's turn.

        `num_parts`: of a small body that is as much work as a large one.
        """
        return await self._workload.lane(max(self._size, num_parts * PART_BYTES)).run(holder, work)

    @property
    def is_small(self) -> bool:
        """Whether the body is read in no time."""
        return self._size <= SMALL_BYTES


class Leased:
    """ASGI middleware that gives each request its lease, and takes it back at the end of the answer."""

    def __init__(self, app: ASGIApp, workload: Workload) -> None:
        self._app, self._workload = app, workload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lease = self._workload.lease()
        scope.setdefault("state", {})["lease"] = lease
        try:
            await self._app(scope, receive, send)
        finally:
            lease.release()


def lease_of(request: Request) -> Allowance:
    """The lease of a request."""
    lease: Allowance = request.state.lease
    return lease


def _busy() -> BusyError:
    message = f"the memory for requests is taken by others; try again in {RETRY_AFTER_S} s"
    return BusyError(message, RETRY_AFTER_S)
