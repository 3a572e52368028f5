"""Who may ask: API keys, and names of this machine that are no trick of a web page.

`Guard` is ASGI middleware around the whole app. It reads headers only and lets nothing else be seen.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from config.errors import UsageError
from server.api.errors import error_body, error_object

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Watchers of a process have no keys.
OPEN_PATHS = frozenset(["/health"])


class KeyRing:
    """The keys that are accepted, each with a name for logs; with none, every key is."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._names = {_digest(key): name for name, key in keys}

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return not self._names

    def replace(self, other: "KeyRing") -> None:
        """Accept another ring's keys from now on."""
        self._names = other._names

    def name_of(self, key: str) -> str | None:
        """The name of a key; None where it is not ours. Takes the same time whatever the key."""
        if self.is_open:
            return "local"
        given = _digest(key)
        found = [name for own, name in self._names.items() if hmac.compare_digest(own, given)]
        return found[0] if found else None


@dataclass(frozen=True)
class Access:
    """Who gets in.

    `hosts` are the names of this machine that clients may use while there are no keys; None takes every
    name. With keys the name does not matter: a page from elsewhere does not know them.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()

    def knows_host(self, host: str) -> bool:
        """Whether a Host header is no trick. A name made to point here is one; an address never is."""
        name = _without_port(host).lower()
        is_checked = self.keys.is_open and self.hosts is not None
        return not is_checked or name in (self.hosts or ()) or _is_address(name)


class Guard:
    """Refuses requests before the app sees them."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._access.knows_host(headers.get("host", "")):
            message = "the Host header has a name that this server does not know; --allowed-hosts adds names"
            await _refuse(scope, send, 403, message, "permission_denied")
            return
        name = self._access.keys.name_of(_key_of(headers))
        if name is None and scope["path"] not in OPEN_PATHS:
            await _refuse(scope, send, 401, "this server needs one of its API keys", "authentication")
            return
        scope.setdefault("state", {})["key_name"] = name or "none"
        await self._app(scope, receive, send)


def read_keys(key: str | None, key_file: Path | None) -> KeyRing:
    """The key on the command line and those in a file: a key in each line, perhaps with `name:` before it."""
    keys = [("default", key)] if key else []
    if key_file:
        keys += _lines(key_file)
        if not keys:
            raise UsageError(f"--api-key-file {key_file} holds no key, so everybody would get in")
    return KeyRing(keys)


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read --api-key-file {path}: {error}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            name, colon, key = text.rpartition(":")
            if not key.strip():  # an empty key would let in whoever sends none
                raise UsageError(f"--api-key-file {path}: line {number} has a name but no key")
            keys.append((name.strip() if colon else f"line {number}", key.strip()))
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host in LOOPBACK_NAMES or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(headers: Headers) -> str:
    """The bearer token, or what Anthropic's clients send instead."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


async def _refuse(scope: Scope, send: Send, status: int, message: str, error_type: str) -> None:
    body = error_body(scope["path"], error_object(status, message, error_type))
    raw = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(raw)).encode()),
        (b"x-should-retry", b"false"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
