"""The HTTP server around the app: its socket, its settings, how it stops, what it says of a full house."""

import asyncio
import errno
import logging
import math
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from config.errors import UsageError
from config.settings import Settings
from server.api.connection import HttpConnection
from server.api.doors import Doors
from server.api.watch.record import RequestRecord
from server.link.supervisor import EngineProcess

# Answers under way have so long to end when the server is told to stop; then their clients are told,
DRAIN_TIMEOUT_S = 5.0
# which takes them less than this.
FAREWELL_S = 2
# Clients that the system holds until they are accepted, and how many are before any of them gets a place.
MAX_BACKLOG = 1024
# It takes three rounds of the event loop until a client that gave way has given its descriptor back.
ACCEPTED_AT_ONCE = 8
# How often the log says that no client can be accepted.
COMPLAINT_S = 30.0

log = logging.getLogger(__name__)


def make_server_config(
    settings: Settings,
    app: FastAPI,
    doors: Doors | None = None,
    note: Callable[[RequestRecord], None] = lambda record: None,
) -> uvicorn.Config:
    """How uvicorn serves the app. Raises UsageError for a certificate that cannot be used.

    `note` hears of each request that is refused before the app sees it.
    """
    if settings.ssl_keyfile and not settings.ssl_certfile:
        raise UsageError("--ssl-keyfile needs --ssl-certfile")
    config = uvicorn.Config(
        app,
        http=partial(HttpConnection, doors=doors or Doors(), note=note),  # type: ignore[arg-type]
        backlog=ACCEPTED_AT_ONCE,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(DRAIN_TIMEOUT_S) + FAREWELL_S,
        lifespan="off",
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
        raise UsageError(f"--ssl-certfile or --ssl-keyfile cannot be used: {error}") from error
    return config


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, taken before anything is loaded; nobody can connect until it listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return _bound(socket.socket(family, kind, protocol), address)
    except (OSError, UnicodeError) as error:  # the latter where no name can be so
        reason = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise UsageError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from error


def _bound(listener: socket.socket, address: Any) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class HttpServer(uvicorn.Server):
    """Cuts no answer off without a word: an agent would take the part that it has for the whole."""

    def __init__(self, config: uvicorn.Config, engine: EngineProcess) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops the server; at a second SIGINT at once.

        uvicorn's own raises the signal again at the end, which would end this process before the engine has
        written what it keeps.
        """
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; uvicorn's has asyncio make the system's line as short as its own."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(MAX_BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers under way; those that take too long get an error."""
        timer = asyncio.get_running_loop().call_later(DRAIN_TIMEOUT_S, self._engine.dismiss_all)
        await super().shutdown(sockets)
        timer.cancel()


class Complaints:
    """Logs errors of the event loop, and now and then that no client can be accepted."""

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one; asyncio calls this."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            loop.default_exception_handler(context)
        elif loop.time() - self._said_at > COMPLAINT_S:
            self._said_at = loop.time()
            log.error("%s: %s", context.get("message"), error.strerror)
