"""Requests while they run, and what hears of each when it is over. One `Watch` for each service.

`Watched` is ASGI middleware: it opens a record for every HTTP request, refused ones too, and closes it.
"""

import re
import time
from collections.abc import Callable, Iterator

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.request_id import REQUEST_ID
from server.api.access.keys import Key
from server.api.watch.record import RequestRecord, Stats

_PARAMETER = re.compile(r"\{[^}]*\}")
Sink = Callable[[RequestRecord], None]
# Reasons of refusals where the answer itself gives none.
REASONS = {
    401: "authentication",
    403: "permission_denied",
    404: "not_found",
    405: "not_found",
    499: "cancelled",
}


class Watch:
    """The requests under way, in order of arrival, and the sinks that hear of each at its end."""

    def __init__(self, stats: Callable[[], Stats], sinks: tuple[Sink, ...] = ()) -> None:
        """`stats` gives the engine's counts as they were told last."""
        self._stats = stats
        self._sinks = list(sinks)
        self._open: dict[str, RequestRecord] = {}

    def add_sink(self, sink: Sink) -> None:
        """Lets another one hear of requests that end from now on."""
        self._sinks.append(sink)

    def begin(self, record: RequestRecord) -> None:
        """A request has come."""
        record.stats_before = self._stats()
        self._open[record.id] = record

    def end(self, record: RequestRecord) -> None:
        """A request is over, however it ended."""
        self._open.pop(record.id, None)
        record.stats_after = self._stats() if record.is_generation else {}
        record.total_s = time.monotonic() - record.began_s
        for sink in self._sinks:
            sink(record)

    @property
    def generations(self) -> Iterator[RequestRecord]:
        """The requests under way that the engine works on, or that wait for it."""
        return (record for record in list(self._open.values()) if record.is_generation)

    def find(self, request_id: str) -> RequestRecord | None:
        """A request under way."""
        return self._open.get(request_id)


class RouteNames:
    """The templates of all routes, so that paths are counted under a bounded number of names."""

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._templates: list[tuple[re.Pattern[str], str]] = []

    def add(self, base: str, router: APIRouter) -> None:
        """Learns the routes that a router has below a base."""
        for path in {base + route.path for route in router.routes if isinstance(route, APIRoute)}:
            if "{" in path:
                self._templates.append((re.compile(_PARAMETER.sub(".+", path)), path.replace(":path", "")))
            else:
                self._exact.add(path)
        self._templates.sort(key=lambda one: -len(one[1]))

    def find(self, path: str) -> str:
        """The template that a path means; "other" where there is none."""
        if path in self._exact:
            return path
        return next((name for pattern, name in self._templates if pattern.fullmatch(path)), "other")


class Watched:
    """Opens and closes the record of each request; stands before the guard, which refuses some."""

    def __init__(self, app: ASGIApp, watch: Watch, route_of: Callable[[str], str]) -> None:
        """`route_of` gives the route of a path, from a bounded number of them."""
        self._app, self._watch, self._route_of = app, watch, route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and notes what becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        self._watch.begin(record)
        token = REQUEST_ID.set(record.id)
        try:
            await self._app(scope, receive, send_on)
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            record.status = record.status or 499  # its client left before there was an answer
            self._close(record, scope)
            REQUEST_ID.reset(token)

    def _close(self, record: RequestRecord, scope: Scope) -> None:
        key = scope["state"].get("key")
        record.key_name = key.name if isinstance(key, Key) else "none"
        record.route = self._route_of(record.path)
        if refused := scope["state"].get("refused"):  # below the app, whose own answer nobody got
            record.status, record.reason = refused
        record.reason = record.reason or record.failure
        if record.status >= 400 and not record.reason:
            record.reason = REASONS.get(
                record.status, "server" if record.status >= 500 else "invalid_request"
            )
        self._watch.end(record)
