"""The engine process seen from the HTTP process: starts it, talks to it, notices its death.

`EngineProcess` is the real `Engine`. Its methods and all of its state belong to the thread of the event
loop. For each child two threads stand between: one writes commands, so that a child that does not read
cannot block the loop; one reads events and hands them to the loop.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import server
from server.engine.blas import with_fast_blas
from server.engine.interface import EngineStatus
from server.engine.messages import (
    Cancel,
    Command,
    EngineConfig,
    Event,
    Failed,
    Finished,
    Generate,
    Load,
    LoadFailed,
    Loading,
    Ready,
    RequestEvent,
    Shutdown,
    Stats,
)

MAX_STARTS_IN_A_ROW = 5
FIRST_RESTART_DELAY_S = 0.5
STOP_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class EngineProcess:
    """A child process that owns the model; restarted when it dies."""

    def __init__(
        self,
        config: EngineConfig,
        worker: str = "server.engine.worker",
        on_usage_error: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._worker = worker
        self._on_usage_error = on_usage_error or log.error
        self._status = EngineStatus("down", "the engine has not been started")
        self._requests: dict[str, asyncio.Queue[RequestEvent]] = {}
        self._child: _Child | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._num_failed_starts = 0
        self._is_closed = False

    @property
    def status(self) -> EngineStatus:
        """Whether requests are answered now."""
        return self._status

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is a child."""
        return self._child.process.pid if self._child else None

    def start(self) -> None:
        """Start the child. Call from the event loop."""
        self._status = EngineStatus("loading", "the engine is starting")
        loop = asyncio.get_running_loop()
        self._child = child = _Child(self._worker)
        child.send(Load(self._config))
        child.read_events(
            lambda event: loop.call_soon_threadsafe(self._on_event, child, event),
            lambda code: loop.call_soon_threadsafe(self._on_death, child, code),
        )

    async def close(self) -> None:
        """End the child, gently first."""
        self._is_closed = True
        if self._restart:
            self._restart.cancel()
        if child := self._child:
            self._child = None
            self._status = EngineStatus("down", "the server is stopping")
            self._fail_all("the server is stopping")
            await asyncio.to_thread(child.stop)

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        """Events of one request, the last of them Finished or Failed."""
        if self._child is None or self._status.state != "ready":
            yield Failed(request.request_id, "died", self._status.text)
            return
        events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._requests[request.request_id] = events
        self._child.send(request)
        is_over = False
        try:
            while not is_over:
                event = await events.get()
                is_over = isinstance(event, Finished | Failed)
                yield event
        finally:
            if not is_over:
                self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        if self._requests.pop(request_id, None) is not None and self._child:
            self._child.send(Cancel(request_id))

    def _on_event(self, child: "_Child", event: Event) -> None:
        if child is not self._child:
            return
        match event:
            case Loading(fraction, text):
                self._status = EngineStatus("loading", text, fraction)
            case Ready(info):
                self._num_failed_starts = 0
                self._status = EngineStatus("ready", info=info)
                log.info("ready: context %d tokens", info.context_length)
            case Stats():
                self._status = replace(self._status, stats=event)
            case LoadFailed(message, is_usage_error):
                self._status = EngineStatus("down", message)
                if is_usage_error:
                    self._is_closed = True
                    self._on_usage_error(message)
            case Finished() | Failed():
                if events := self._requests.pop(event.request_id, None):
                    events.put_nowait(event)
            case _:
                if events := self._requests.get(event.request_id):
                    events.put_nowait(event)

    def _on_death(self, child: "_Child", exit_code: int) -> None:
        if child is not self._child:
            return
        self._child = None
        reason = f"the engine process ended ({_describe_exit(exit_code)})"
        if self._status.state == "down":  # it said why before it went
            reason = self._status.text
        self._fail_all(reason)
        if self._is_closed:
            return
        log.error(reason)
        self._num_failed_starts += 1
        if self._num_failed_starts >= MAX_STARTS_IN_A_ROW:
            text = f"{reason}; given up after {MAX_STARTS_IN_A_ROW} starts"
            self._status = EngineStatus("down", text)
            log.error(text)
            return
        delay_s = FIRST_RESTART_DELAY_S * 2 ** (self._num_failed_starts - 1)
        self._status = EngineStatus("down", f"{reason}; it is started again in {delay_s:g} s")
        self._restart = asyncio.get_running_loop().call_later(delay_s, self.start)

    def _fail_all(self, reason: str) -> None:
        for request_id, events in self._requests.items():
            events.put_nowait(Failed(request_id, "died", reason))
        self._requests.clear()


class _Child:
    """One life of the engine process, with its pipe and its two threads."""

    def __init__(self, worker: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P: a folder named models/ where the server was started must not be imported
                [sys.executable, "-P", "-m", worker, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_child_environment(),
                stdin=subprocess.DEVNULL,
            )
        self._pipe = Connection(ours.detach())
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_commands, name="engine-commands", daemon=True)
        self._reader: threading.Thread | None = None
        self._writer.start()

    def send(self, command: Command) -> None:
        """Queue a command; never blocks."""
        self._outbox.put(command)

    def read_events(self, on_event: Callable[[Event], object], on_death: Callable[[int], object]) -> None:
        """Start the thread that passes on what the child says, and at last its exit code."""
        self._reader = threading.Thread(
            target=self._read, args=(on_event, on_death), name="engine-events", daemon=True
        )
        self._reader.start()

    def _read(self, on_event: Callable[[Event], object], on_death: Callable[[int], object]) -> None:
        try:
            self._read_to_the_end(on_event)
            on_death(self.process.wait())
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            log.debug("the engine spoke after the event loop had ended")
        finally:
            self._outbox.put(None)

    def _read_to_the_end(self, on_event: Callable[[Event], object]) -> None:
        while True:
            try:
                event = self._pipe.recv()
            except (EOFError, OSError):
                return
            on_event(event)

    def stop(self) -> None:
        """Ask, wait, insist. Blocks; call from a thread that may."""
        self.send(Shutdown())
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in (self._reader, self._writer):
            if thread:
                thread.join()

    def _write_commands(self) -> None:
        while (command := self._outbox.get()) is not None:
            try:
                self._pipe.send(command)
            except OSError:  # the reader sees the same end, and tells it
                break
        if self._reader:
            self._reader.join()
        self._pipe.close()


def _child_environment() -> dict[str, str]:
    """The child imports this very code, wherever it was started."""
    root = str(Path(server.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return with_fast_blas({**os.environ, "PYTHONPATH": ":".join(filter(None, [root, inherited]))})


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
