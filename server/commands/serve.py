"""`glmserve serve`: checks what can be checked at once, then runs HTTP here and the engine beside it."""

import asyncio
import errno
import hashlib
import logging
import math
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from config.errors import GaveUp, GlmserveError, UsageError
from config.settings import Settings
from server.api.access.guard import LOOPBACK_NAMES, Access, is_loopback
from server.api.access.keys import read_keys
from server.api.access.receipts import Ledger
from server.api.app import make_app
from server.api.connection import HttpConnection
from server.api.doors import Doors, make_doors, raise_descriptor_limit
from server.api.prompt.remembered import Remembered
from server.api.request.model_names import ModelNames
from server.api.request.parameters import Parameters
from server.api.service import Dialect, Service
from server.commands.checkpoint import FoundCheckpoint, choose_checkpoint
from server.commands.start_lines import tell_start
from server.glm.files import load_sampling_defaults
from server.glm.templates.template import load_chat_template
from server.glm.tokenizer import load_tokenizer
from server.heap import bound_heap, look_rarely
from server.launcher import take_hangups
from server.link.messages import EngineConfig
from server.link.supervisor import Deadlines, EngineProcess
from server.logs import set_up_logging
from streaming.files.in_use import shared_use

# Answers under way have so long to end when the server is told to stop; then their clients are told,
DRAIN_TIMEOUT_S = 5.0
# which takes them less than this.
FAREWELL_S = 2
JSON_KEEPALIVE_S = 10.0
# A thread that renders a prompt lets the event loop go on after so long; Python's default is 5 ms.
SWITCH_S = 0.001
# Clients that the system holds until they are accepted, and how many are before any of them gets a place.
MAX_BACKLOG = 1024
# It takes three rounds of the event loop until a client that gave way has given its descriptor back.
ACCEPTED_AT_ONCE = 8
# How often the log says that no client can be accepted.
COMPLAINT_S = 30.0

log = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Serve until interrupted. Raises UsageError where a person must act first."""
    _open_log(settings)
    bound_heap()
    sys.setswitchinterval(SWITCH_S)
    access = make_access(settings)
    checkpoint = choose_checkpoint(settings.model, needs_glm=settings.stream_experts)
    if checkpoint.remark:
        log.info("%s", checkpoint.remark)
    with shared_use(checkpoint.directory), listen(settings.host, settings.port) as listener:
        dialect = load_dialect(checkpoint.directory)
        fault = asyncio.run(_Serving(settings, access, checkpoint, dialect, listener).run())
    if fault:
        raise fault
    return 0


def _open_log(settings: Settings) -> None:
    try:
        set_up_logging(settings.log_level, settings.log_format, settings.log_file, rotates=True)
    except OSError as error:
        raise UsageError(f"--log-file {settings.log_file} cannot be written: {error.strerror}") from error


def make_access(settings: Settings) -> Access:
    """Who gets in. Raises UsageError where that would be everybody on the network, by accident."""
    keys = read_keys(settings.api_key, settings.api_key_file)
    if keys.is_open and not settings.insecure and not is_loopback(settings.host):
        raise UsageError(
            f"--host {settings.host} is reachable from other machines, and there is no key: add "
            "--api-key-file (or --api-key), or --insecure if everybody there may use this server"
        )
    hosts = frozenset([*LOOPBACK_NAMES, settings.host.lower(), *_listed(settings.allowed_hosts.lower())])
    return Access(
        keys,
        None if "*" in hosts else hosts,
        tuple(_listed(settings.cors_origins)),
        settings.metrics_key,
        settings.metrics_open,
    )


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def load_dialect(checkpoint: Path) -> Dialect:
    """How this checkpoint writes."""
    return Dialect(
        load_tokenizer(checkpoint),
        load_chat_template(checkpoint),
        load_sampling_defaults(checkpoint),
        checkpoint,
    )


def make_server_config(settings: Settings, app: FastAPI, doors: Doors | None = None) -> uvicorn.Config:
    """How uvicorn serves the app. Raises UsageError for a certificate that cannot be used."""
    if settings.ssl_keyfile and not settings.ssl_certfile:
        raise UsageError("--ssl-keyfile needs --ssl-certfile")
    config = uvicorn.Config(
        app,
        http=partial(HttpConnection, doors=doors or Doors()),  # type: ignore[arg-type]
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


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before minutes are spent on loading."""
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
        listener.listen(MAX_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class _Server(uvicorn.Server):
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


class _Complaints:
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


@dataclass
class _Serving:
    """One run: the HTTP server, the engine, and why the run ended."""

    settings: Settings
    access: Access
    checkpoint: FoundCheckpoint
    dialect: Dialect
    listener: socket.socket
    fault: GlmserveError | None = None
    server: uvicorn.Server | None = field(default=None, init=False)

    async def run(self) -> GlmserveError | None:
        settings = self.settings
        engine = EngineProcess(
            make_engine_config(settings, self.checkpoint.directory),
            on_usage_error=lambda message: self._stop(UsageError(message)),
            on_given_up=(lambda message: self._stop(GaveUp(message))) if is_service() else None,
            deadlines=Deadlines(settings.queue_timeout, settings.request_timeout, settings.step_timeout),
            max_queue=settings.max_queue,
        )
        model_id = self.settings.served_model_name or self.checkpoint.model_id
        names = ModelNames(model_id, self.settings.model_policy)
        patience_s = JSON_KEEPALIVE_S if self.settings.json_keepalive else None
        remembered = make_remembered(self.settings, self.checkpoint.directory)
        ledger = Ledger(prefix_directory(self.settings))
        service = Service(
            engine,
            self.dialect,
            names,
            ledger,
            remembered=remembered,
            patience_s=patience_s,
            parameters=Parameters(self.settings.strict_parameters),
        )
        app = make_app(service, self.access)
        asyncio.get_running_loop().set_exception_handler(_Complaints())
        doors = make_doors(raise_descriptor_limit())
        self.server = _Server(make_server_config(self.settings, app, doors), engine)
        look_rarely()
        engine.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._read_keys_again)
        take_hangups()
        host, port = self.listener.getsockname()[:2]
        scheme = "https" if self.settings.ssl_certfile else "http"
        log.info("listening on %s://%s:%d (OpenAI: /v1, OpenRouter: /api/v1)", scheme, host, port)
        telling = asyncio.create_task(tell_start(engine, model_id, f"{scheme}://{host}:{port}/"))
        try:
            await self.server.serve(sockets=[self.listener])
        finally:
            telling.cancel()
            await engine.close()
            await asyncio.to_thread(remembered.close)
            await asyncio.to_thread(ledger.close_file)
        return self.fault

    def _read_keys_again(self) -> None:
        try:
            self.access.keys.replace(read_keys(self.settings.api_key, self.settings.api_key_file))
            log.info("the keys were read again")
        except UsageError as error:
            log.error("the keys stay as they are: %s", error)

    def _stop(self, fault: GlmserveError) -> None:
        assert self.server, "the engine is started after the server is made"
        self.fault = fault
        self.server.should_exit = True


def is_service() -> bool:
    """Whether systemd or launchd has started this process, and starts it again when it fails."""
    by_launchd = os.environ.get("XPC_SERVICE_NAME", "0")  # "0" in a terminal; of an app, application.NAME
    return "INVOCATION_ID" in os.environ or not by_launchd.startswith(("0", "application."))


def prefix_directory(settings: Settings) -> Path | None:
    """Where saved prompts outlive the process; None where they do not."""
    if settings.prefix_cache_size == 0 or settings.prefix_cache_memory == 0:
        return None
    return settings.prefix_cache_dir or cache_home() / "glmserve" / "prefix"


def cache_home(platform: str = sys.platform) -> Path:
    """Where programs keep what can be made again: on a Mac a folder that Time Machine leaves out."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    return Path.home() / ("Library/Caches" if platform == "darwin" else ".cache")


def make_remembered(settings: Settings, checkpoint: Path) -> Remembered:
    """What the server has said, on disk beside the prefix cache."""
    vocabulary = (checkpoint / "tokenizer.json").read_bytes()
    return Remembered(prefix_directory(settings), hashlib.sha256(vocabulary).hexdigest())


def make_engine_config(settings: Settings, directory: Path) -> EngineConfig:
    """What the engine needs to know of the settings."""
    return EngineConfig(
        model_path=directory,
        stream_experts=settings.stream_experts,
        ram_budget_bytes=settings.ram_budget,
        max_context=settings.max_context,
        log_level=settings.log_level,
        log_format=settings.log_format,
        log_file=settings.log_file,
        expert_policy=settings.expert_policy,
        decode_share=settings.decode_share,
        max_inflight_per_agent=settings.max_inflight_per_agent,
        batch_width=settings.batch_width,
        max_queue=settings.max_queue,
        mirrors=tuple(Path(os.path.expanduser(mirror)).absolute() for mirror in settings.mirror),
        prefix_memory_bytes=settings.prefix_cache_memory,
        prefix_directory=prefix_directory(settings),
        prefix_disk_bytes=settings.prefix_cache_size,
        prefix_writes_per_day=settings.prefix_cache_writes,
        sweep_tokens=settings.sweep_tokens,
        wires_memory=settings.wire,
        lookahead=settings.lookahead,
        straight_reads=settings.straight_reads,
    )
