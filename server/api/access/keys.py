"""Who may ask: API keys, and names of this machine that are no trick of a web page.

`Guard` is ASGI middleware around the whole app. It reads headers only and lets nothing else be seen.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from config.errors import MAX_RETRY_AFTER_S, UsageError
from server.api.access.quotas import LIMITS, Accounts, Quota, Spent, parse_quota
from server.api.error_bodies import error_body, error_object

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Watchers of a process have no keys.
OPEN_PATHS = frozenset(["/health"])
# What counts against a quota.
COUNTED_PATHS = ("/completions", "/messages", "/responses")
# In the middle of a word a # belongs to the key.
_REMARK = re.compile(r"(?:^|\s)#")


class KeyRing:
    """The keys that are accepted, each with a name for logs; with none, every key is.

    Quotas go by name: several keys of one name share one.
    """

    def __init__(
        self, keys: Iterable[tuple[str, str]] = (), quotas: Mapping[str, Quota] | None = None
    ) -> None:
        self._names = {_digest(key): name for name, key in keys}
        self._quotas = quotas or {}

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return not self._names

    def replace(self, other: "KeyRing") -> None:
        """Accept another ring's keys from now on, within its quotas."""
        self._names, self._quotas = other._names, other._quotas

    def quota_of(self, name: str) -> Quota:
        """How much the keys of this name may use."""
        return self._quotas.get(name, Quota())

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

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header is none of a page from elsewhere.

        A browser lets any page post without asking first, as long as the page does not want to read the
        answer. "null" is a page that hides where it is from; extensions and apps have schemes of their own.
        """
        scheme, _, name = origin.partition("://")
        is_page = scheme in ("http", "https", "null")
        is_named = not {origin, "*"}.isdisjoint(self.cors_origins)
        if not is_page or is_named or not self.keys.is_open or self.hosts is None:
            return True
        return _without_port(name).lower() in {*self.hosts, _without_port(host).lower()}


class Guard:
    """Refuses requests before the app sees them."""

    def __init__(self, app: ASGIApp, access: Access, accounts: Accounts) -> None:
        self._app = app
        self._access = access
        self._accounts = accounts

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
        if not self._access.knows_origin(headers.get("origin", ""), headers.get("host", "")):
            message = "web pages of this origin may not call this server; --cors-origins lets them in"
            await _refuse(scope, send, 403, message, "permission_denied")
            return
        name = self._access.keys.name_of(key_of(headers))
        if name is None and scope["path"] not in OPEN_PATHS:
            await _refuse(scope, send, 401, "this server needs one of its API keys", "authentication")
            return
        if name and (spent := self._spent(name, scope)):
            await _refuse_spent(scope, send, name, spent)
            return
        state = scope.setdefault("state", {})
        state["key_name"] = name or "none"
        state["quota"] = self._access.keys.quota_of(state["key_name"])
        await self._app(scope, receive, send)

    def _spent(self, name: str, scope: Scope) -> Spent | None:
        if scope["method"] != "POST" or not scope["path"].endswith(COUNTED_PATHS):
            return None
        return self._accounts.admit(name, self._access.keys.quota_of(name))


def read_keys(key: str | None, key_file: Path | None) -> KeyRing:
    """The key on the command line and those in a file, a key in each line:

    [NAME:] KEY [requests/minute=N] [requests/day=N] [tokens/minute=N] [tokens/day=N]
    """
    keys = [("default", key)] if key else []
    quotas: dict[str, Quota] = {}
    for number, text in _lines(key_file) if key_file else ():
        try:
            name, own, quota = _parse_line(text)
        except UsageError as error:
            raise UsageError(f"--api-key-file {key_file}: line {number}: {error}") from error
        keys.append((name or f"line {number}", own))
        if quota.limits:
            quotas[keys[-1][0]] = quota
    if key_file and len(keys) == bool(key):
        raise UsageError(f"--api-key-file {key_file} holds no key, so everybody would get in")
    return KeyRing(keys, quotas)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows begin with a mark
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read --api-key-file {path}: {error}") from error
    texts = [(number, _REMARK.split(line, 1)[0].strip()) for number, line in enumerate(lines, 1)]
    return [(number, text) for number, text in texts if text]


def _parse_line(text: str) -> tuple[str, str, Quota]:
    """Name (perhaps empty), key and quota of a line."""
    named, colon, rest = text.rpartition(":")
    key, *limits = rest.split() or [""]
    if not key or key.partition("=")[0] in LIMITS:  # an empty key lets in whoever sends none
        raise UsageError("there is a name but no key")
    return named.strip() if colon else "", key, parse_quota(limits)


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


def key_of(headers: Mapping[str, str]) -> str:
    """The bearer token, or what Anthropic's clients send instead."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


async def _refuse_spent(scope: Scope, send: Send, name: str, spent: Spent) -> None:
    limit = f"{spent.amount} {spent.limit}"
    message = f"the key of {name!r} has used its {limit}; there is more in {spent.wait_s} s"
    can_wait = spent.wait_s <= MAX_RETRY_AFTER_S
    headers = {
        "retry-after": str(min(spent.wait_s, MAX_RETRY_AFTER_S)),
        "x-should-retry": "true" if can_wait else "false",
    }
    await _refuse(scope, send, 429, message, "rate_limit_exceeded", headers)


async def _refuse(
    scope: Scope,
    send: Send,
    status: int,
    message: str,
    error_type: str,
    headers: Mapping[str, str] = {"x-should-retry": "false"},
) -> None:
    body = error_body(scope["path"], error_object(status, message, error_type))
    raw = json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
    if status == 401:
        given["www-authenticate"] = "Bearer"
    raw_headers = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": raw})
