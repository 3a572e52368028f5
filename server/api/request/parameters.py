"""What becomes of parameters that this server does not know: they are ignored, and it is said.

A header of the answer names them, so does the log once for each agent, and a count goes to /metrics; or, with
--strict-parameters, they are refused. `Parameters` belongs to the service; any thread may call it.
"""

import difflib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.errors import RequestError
from server.api.access.receipts import Caller
from server.api.request.common_fields import Noted

HEADER = "X-Glmserve-Ignored"
MAX_NAMES = 20
MAX_NAME = 80
# Agents whose parameters were told already; one that comes back after so many others is told again.
MAX_AGENTS = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ignored:
    """The path of something that a body holds in vain, and the field that it may have been meant to be."""

    path: str
    meant: str | None = None

    def __str__(self) -> str:
        """Printable and without commas, whatever the client chose: it goes to headers and to the log."""
        return quote(self.path[:MAX_NAME], safe="[]:")


class Parameters:
    """Notes what requests hold in vain."""

    def __init__(self, is_strict: bool = False) -> None:
        self.num_ignored = 0
        self._is_strict = is_strict
        self._told: OrderedDict[str, set[str]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, request: Request, body: Noted, caller: Caller, requires_all: bool = False) -> None:
        """Say what of the body is ignored, if anything. Raises RequestError where nothing may be."""
        found = list(islice(ignored_in(body), MAX_NAMES))
        if not found:
            return
        if self._is_strict or requires_all:
            raise _refusal(found[0])
        request.state.ignored = [*getattr(request.state, "ignored", ()), *map(str, found)]
        with self._lock:
            self.num_ignored += len(found)
            self._tell(caller, found)

    def _tell(self, caller: Caller, found: list[Ignored]) -> None:
        told = self._told.setdefault(caller.group, set())
        self._told.move_to_end(caller.group)
        if len(self._told) > MAX_AGENTS:
            self._told.popitem(last=False)
        new = [one for one in found if str(one) not in told]
        room = MAX_NAMES - len(told)  # paths with positions in them would be new for ever
        if not new or room <= 0:
            return
        told.update(map(str, new[:room]))
        hints = [f"{one} (did you mean {one.meant}?)" if one.meant else str(one) for one in new]
        log.warning("%s: ignored here: %s", caller.label, ", ".join(hints))


class SaysIgnored:
    """ASGI middleware that puts the names into a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a route may note names until its answer begins."""

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and (names := scope["state"].get("ignored")):
                MutableHeaders(scope=message)[HEADER] = ", ".join(names[:MAX_NAMES])
            await send(message)

        if scope["type"] == "http":
            scope.setdefault("state", {})
        await self._app(scope, receive, send_on if scope["type"] == "http" else send)


def ignored_in(body: BaseModel, path: str = "") -> Iterator[Ignored]:
    """What a body holds in vain, part by part."""
    if isinstance(body, Noted):
        for name in body.overlooked():
            yield Ignored(path + name, _nearest(name, body))
    for field in type(body).model_fields:
        value = getattr(body, field)
        if isinstance(value, BaseModel):
            yield from ignored_in(value, f"{path}{field}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from ignored_in(item, f"{path}{field}[{index}].")


def _nearest(name: str, body: BaseModel) -> str | None:
    near = difflib.get_close_matches(name[:MAX_NAME], type(body).model_fields, n=1, cutoff=0.75)
    return near[0] if near else None


def _refusal(found: Ignored) -> RequestError:
    hint = f"; did you mean {found.meant!r}?" if found.meant else ""
    name = found.path.rpartition(".")[2][:MAX_NAME]
    return RequestError(f"{name!r} is not supported{hint}", param=found.path[:MAX_NAME])
