"""Slashes at the end of a path mean nothing. ASGI middleware before everything that reads paths."""

from starlette.types import ASGIApp, Receive, Scope, Send


class TrailingSlash:
    """Serves `/v1/models/` as `/v1/models`.

    A redirect in its place would name the scheme and the host as this server sees them, which behind a proxy
    are not the client's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, by its path without slashes at the end."""
        if scope["type"] == "http" and (path := scope["path"].rstrip("/")):
            scope = dict(scope) | {"path": path, "raw_path": scope.get("raw_path", b"").rstrip(b"/")}
        await self._app(scope, receive, send)
