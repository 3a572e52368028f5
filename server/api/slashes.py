"""Slashes at the end of a path, and several in a row, mean nothing. ASGI middleware before all others."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

SLASHES = re.compile("/{2,}")


class TrailingSlash:
    """Serves `/v1/models/` as `/v1/models`, and `//v1/models`, which a base URL with a slash leads to.

    A redirect in its place would name the scheme and the host as this server sees them, which behind a proxy
    are not the client's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, by its path without slashes that mean nothing."""
        if scope["type"] == "http" and (path := SLASHES.sub("/", scope["path"]).rstrip("/")):
            scope = dict(scope) | {"path": path, "raw_path": scope.get("raw_path", b"").rstrip(b"/")}
        await self._app(scope, receive, send)
