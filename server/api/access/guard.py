"""Who may ask, and who may change the server: by keys, or by names of this machine that are no trick.

`Guard` is ASGI middleware around the whole app. It reads headers only and lets nothing else be seen.
`require_admin` is for the routes of operators.
"""

import hmac
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.errors import MAX_RETRY_AFTER_S, RequestError
from config.sizes import in_words
from server.api.access.keys import Key, KeyRing, digest, key_of
from server.api.access.quotas import Accounts, Spent
from server.api.error_bodies import error_body, error_object, note_reason

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# Watchers of a process have no keys.
# Pages and their document hold nothing that is secret: the page asks for a key before it asks for anything.
OPEN_PATHS = frozenset(["/health", "/", "/docs"])
METRICS_PATH = "/metrics"
# What counts against a quota.
COUNTED_PATHS = ("/completions", "/messages", "/responses")
# What proxies add. With one of them a request from this machine is one of another.
PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who gets in.

    `hosts` are the names of this machine that clients may use while there are no keys; None takes every
    name. With keys the name does not matter: a page from elsewhere does not know them.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()
    metrics_key: str | None = None
    is_metrics_open: bool = False

    def may_read_metrics(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request is for /metrics and may have it without a key of the ring."""
        if scope["path"] != METRICS_PATH or scope["method"] not in ("GET", "HEAD"):
            return False
        is_key = self.metrics_key is not None and hmac.compare_digest(
            digest(key_of(headers)), digest(self.metrics_key)
        )
        return self.is_metrics_open or is_key

    def knows_host(self, host: str) -> bool:
        """Whether a Host header is no trick. A name made to point here is one; an address never is."""
        name = _without_port(host).lower()
        is_checked = self.keys.is_open and self.hosts is not None
        return not is_checked or name in (self.hosts or ()) or _is_address(name)

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header is none of a page from elsewhere.

        A browser lets any page post without asking first, as long as the page does not want to read the
        answer. With keys, or any host allowed, or any page, the origin does not matter.
        """
        is_checked = self.keys.is_open and self.hosts is not None and "*" not in self.cors_origins
        return not is_checked or not self.is_foreign(origin, host)

    def is_foreign(self, origin: str, host: str) -> bool:
        """Whether an Origin header is that of a page from elsewhere which was not named.

        "null" is a page that hides where it is from; extensions and apps have schemes of their own.
        """
        scheme, _, name = origin.partition("://")
        if scheme not in ("http", "https", "null") or origin in self.cors_origins:
            return False
        return _without_port(name).lower() not in {*(self.hosts or ()), _without_port(host).lower()}

    def key_of(self, scope: Scope, headers: Headers) -> Key | None:
        """What a request may do; None where it has no key of ours."""
        if self.keys.is_open:
            name = _without_port(headers.get("host", "")).lower()
            is_named = name in {*LOOPBACK_NAMES, *(self.hosts or ())} or _is_address(name)
            return Key(is_admin=is_named and _is_local(scope, headers))
        return self.keys.find(key_of(headers))


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
        key = self._access.key_of(scope, headers)
        is_open = scope["path"] in OPEN_PATHS or self._access.may_read_metrics(scope, headers)
        if key is None and not is_open:
            await _refuse(scope, send, 401, "this server needs one of its API keys", "authentication")
            return
        scope.setdefault("state", {})["key"] = key or Key("none")
        is_counted = scope["method"] == "POST" and scope["path"].endswith(COUNTED_PATHS)
        if key and is_counted and key.quota.limits:
            send = self._telling_what_is_left(key, send)
        if key and is_counted and (spent := self._accounts.admit(key.account, key.quota)):
            await _refuse_spent(scope, send, key.name, spent)
            return
        await self._app(scope, receive, send)

    def _telling_what_is_left(self, key: Key, send: Send) -> Send:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._accounts.headers(key.account, key.quota))
            await send(message)

        return send_on


def require_admin(access: Access) -> Callable[[Request], None]:
    """A FastAPI dependency that lets an admin pass and leaves a line in the log. Raises RequestError.

    A POST must be JSON and from no foreign page: browsers ask before they send such a request.
    """

    def check(request: Request) -> None:
        key, headers = request.state.key, request.headers
        if not key.is_admin:
            raise _not_an_admin(access)
        if access.is_foreign(headers.get("origin", ""), headers.get("host", "")):
            message = "web pages of this origin may not do this; --cors-origins names those that may"
            raise RequestError(message, status=403, error_type="permission_denied")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            message = f"this takes Content-Type: application/json, not {kind[:40] or 'none'!r}"
            raise RequestError(message, status=415)
        client = request.client.host if request.client else "an unknown address"
        log.info("admin: %s %s by key %r from %s", request.method, request.url.path, key.name, client)

    return check


def _not_an_admin(access: Access) -> RequestError:
    how = "with a key that has `admin` in its line of --api-key-file"
    if access.keys.is_open:
        how = "from this machine, by the name localhost or its address"
    return RequestError(f"this may be asked only {how}", status=403, error_type="permission_denied")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there, or a client there is this machine."""
    if host in LOOPBACK_NAMES:
        return True
    address = ip_address(host) if _is_address(host) else None
    return address is not None and (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Whether a request comes from this machine, and through no proxy that says so."""
    host, _ = scope.get("client") or ("", 0)
    return is_loopback(host) and not any(name in headers for name in PROXY_HEADERS)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


async def _refuse_spent(scope: Scope, send: Send, name: str, spent: Spent) -> None:
    limit = f"{spent.amount} {spent.limit}"
    message = f"the key of {name!r} has used its {limit}; there is more in {in_words(spent.wait_s)}"
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
    note_reason(scope, error_type)
    body = error_body(scope["path"], error_object(status, message, error_type))
    raw = json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
    if status == 401:
        given["www-authenticate"] = "Bearer"
    raw_headers = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": raw})
