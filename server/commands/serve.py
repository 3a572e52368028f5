"""`glmserve serve`: checks what can be checked at once, then runs HTTP here and the engine beside it."""

import asyncio
import hashlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from config.errors import GaveUp, GlmserveError, UsageError
from config.settings import Settings
from server.api.access.guard import LOOPBACK_NAMES, Access, is_loopback
from server.api.access.keys import read_keys
from server.api.access.receipts import Ledger
from server.api.app import make_app
from server.api.doors import make_doors, raise_descriptor_limit
from server.api.prompt.remembered import Remembered
from server.api.request.model_names import ModelNames
from server.api.request.parameters import Parameters
from server.api.service import Dialect, Service
from server.commands.checkpoint import FoundCheckpoint, choose_checkpoint, family_of_folder
from server.commands.http_server import MAX_BACKLOG, Complaints, HttpServer, bind, make_server_config
from server.commands.start_lines import tell_start
from server.glm.files import load_sampling_defaults
from server.glm.templates.template import load_chat_template
from server.glm.templates.template_files import DEFAULT, find_templates
from server.glm.tokenizer import load_tokenizer
from server.heap import bound_heap, look_rarely
from server.launcher import take_hangups
from server.link.engine_protocol import Engine
from server.link.messages import EngineConfig
from server.link.supervisor import Deadlines, EngineProcess
from server.logs import set_up_logging
from server.ranks import follow, make_cluster
from streaming.files.in_use import shared_use

JSON_KEEPALIVE_S = 10.0
# A thread that reads a body or renders a prompt lets the event loop go on after so long, at each of the
# loop's system calls, of which a request has dozens; Python's default is 5 ms.
SWITCH_S = 0.00005
# How long clients find no open port while the engine looks at its settings, and how often that is looked at.
ACCEPTED_WITHIN_S, LOOK_S = 20.0, 0.05
log = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Serve until interrupted. Raises UsageError where a person must act first."""
    _open_log(settings)
    bound_heap()
    sys.setswitchinterval(SWITCH_S)
    access = make_access(settings)
    checkpoint = choose_checkpoint(settings.model, needs_glm=settings.stream_experts)
    check_cache_folder(settings)
    if settings.rank:
        with shared_use(checkpoint.directory):
            return follow(make_engine_config(settings, checkpoint.directory))
    with shared_use(checkpoint.directory), bind(settings.host, settings.port) as listener:
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
    family = family_of_folder(checkpoint)
    return Dialect(
        load_tokenizer(checkpoint),
        load_chat_template(checkpoint, always_thinks=family.always_thinks),
        load_sampling_defaults(checkpoint),
        checkpoint,
        family.hugging_face_id,
    )


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
        asyncio.get_running_loop().set_exception_handler(Complaints())
        doors = make_doors(raise_descriptor_limit())
        self.server = HttpServer(make_server_config(self.settings, app, doors, app.state.watch.end), engine)
        look_rarely()
        engine.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._read_keys_again)
        take_hangups()
        try:
            await settled(engine)
            if self.fault is None:
                await self._answer(self.server, engine, model_id)
        finally:
            await engine.close()
            await asyncio.to_thread(remembered.close)
            await asyncio.to_thread(ledger.close_file)
        return self.fault

    async def _answer(self, server: uvicorn.Server, engine: EngineProcess, model_id: str) -> None:
        """Listens, and serves until the end."""
        host, port = self.listener.getsockname()[:2]
        try:
            self.listener.listen(MAX_BACKLOG)
        except OSError as error:  # another server has bound the same port, and was quicker
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        if self.checkpoint.remark:
            log.info("%s", self.checkpoint.remark)
        if DEFAULT not in find_templates(self.checkpoint.directory):
            log.info("the checkpoint has no chat template: GLM-5.2's is used")
        scheme = "https" if self.settings.ssl_certfile else "http"
        log.info("listening on %s://%s:%d (OpenAI: /v1, OpenRouter: /api/v1)", scheme, host, port)
        telling = asyncio.create_task(tell_start(engine, model_id, f"{scheme}://{host}:{port}/"))
        try:
            await server.serve(sockets=[self.listener])
        finally:
            telling.cancel()

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


async def settled(engine: Engine) -> None:
    """Returns when the engine has accepted its settings, or has ended; else after a while all the same."""
    patience_s = time.monotonic() + ACCEPTED_WITHIN_S
    while time.monotonic() < patience_s:
        if engine.status.state != "loading" or engine.status.fraction > 0:
            return
        await asyncio.sleep(LOOK_S)


def is_service() -> bool:
    """Whether systemd or launchd has started this process, and starts it again when it fails."""
    by_launchd = os.environ.get("XPC_SERVICE_NAME", "0")  # "0" in a terminal; of an app, application.NAME
    return "INVOCATION_ID" in os.environ or not by_launchd.startswith(("0", "application."))


def prefix_directory(settings: Settings) -> Path | None:
    """Where saved prompts outlive the process; None where they do not."""
    if settings.prefix_cache_size == 0 or settings.prefix_cache_memory == 0:
        return None
    return settings.prefix_cache_dir or cache_home() / "glmserve" / "prefix"


def check_cache_folder(settings: Settings) -> None:
    """Raises UsageError where the folder that the user named for saved prompts cannot be used."""
    folder = settings.prefix_cache_dir
    if folder is None or prefix_directory(settings) is None:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"--prefix-cache-dir {folder} cannot be used ({error.strerror}): name a folder that may be "
            "written, or --prefix-cache-size 0 to keep nothing on disk"
        ) from error


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
        cluster=make_cluster(settings),
    )
