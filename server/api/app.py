"""The HTTP application. `make_app` is its only entrance; the command line and the tests call it."""

import asyncio
import re
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access.account import account_router
from server.api.access.guard import Access, Guard
from server.api.access.quotas import RATE_HEADERS
from server.api.admin.activity_routes import activity_router
from server.api.admin.cache_routes import cache_router
from server.api.admin.catalogue import health_router, models_router
from server.api.admin.engine_routes import engine_router
from server.api.admin.memory_routes import memory_router
from server.api.admin.metrics import metrics_router
from server.api.admin.page_routes import page_router
from server.api.dialects.anthropic import messages_router
from server.api.dialects.chat import chat_router
from server.api.dialects.completions import completion_router
from server.api.dialects.responses import responses_router
from server.api.dialects.tokenize import tokenize_router
from server.api.error_bodies import install_error_handlers
from server.api.openapi import BASES, DescribedApp
from server.api.request.parameters import HEADER, SaysIgnored
from server.api.request.workload import Leased
from server.api.service import Service
from server.api.watch.history import History
from server.api.watch.request_lines import WINDOW_S, RequestLines
from server.api.watch.request_metrics import RequestMetrics
from server.api.watch.watch import RouteNames, Watch, Watched
from server.version import VERSION

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


class HeadAsGet:
    """ASGI middleware that answers HEAD, which probes send, as GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_no_body(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            await send({**message, "body": b""} if is_body else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, send_no_body)
        else:
            await self._app(scope, receive, send)


def make_app(service: Service, access: Access | None = None) -> FastAPI:
    """An app over this service, open to all unless told otherwise.

    It starts and stops nothing: the engine is the caller's.
    """
    access = access or Access()
    app = DescribedApp(
        title="glmserve", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    registry, history = CollectorRegistry(), History()
    lines = RequestLines(later=lambda flush: asyncio.get_running_loop().call_later(WINDOW_S, flush))
    watch = Watch(lambda: _stats(service), (lines, RequestMetrics(registry), history))
    app.state.watch = watch  # hears of what is refused before it comes to the app, too
    names = RouteNames()
    routers = {base: _routers(service, access, watch, history, base) for base in BASES}
    routers[""] += [health_router(service), metrics_router(service, registry), page_router(access)]
    for base, all_of_them in routers.items():
        for router in all_of_them:
            app.include_router(router, prefix=base)
            names.add(base, router)
    install_error_handlers(app)
    app.add_middleware(SaysIgnored)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Leased, workload=service.workload)
    app.add_middleware(Guard, access=access, accounts=service.ledger.accounts)
    app.add_middleware(Watched, watch=watch, route_of=names.find)
    app.add_middleware(TrailingSlash)
    if access.cors_origins:  # outermost: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # those that are asked for: each SDK has its own
            allow_private_network=True,
            expose_headers=["X-Generation-Id", "X-Glmserve-Cache", HEADER, "Retry-After", *RATE_HEADERS],
        )
    return app


def _routers(service: Service, access: Access, watch: Watch, history: History, base: str) -> list[APIRouter]:
    """The routes that every base has; OpenRouter's always end a stream with usage."""
    is_openrouter = base == "/api/v1"
    return [
        chat_router(service, is_openrouter),
        completion_router(service, is_openrouter),
        messages_router(service),
        responses_router(service),
        models_router(service),
        account_router(service),
        tokenize_router(service),
        cache_router(service, access),
        memory_router(service, access),
        engine_router(service, access),
        activity_router(service, watch, history),
    ]


def _stats(service: Service) -> Mapping[str, float]:
    stats = service.engine.status.stats
    return stats.values if stats else {}
