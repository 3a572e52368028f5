"""The engine process seen from the HTTP process: starts it, talks to it, notices its death and its silence.

`EngineProcess` is the real `Engine`. Its methods and all of its state belong to the thread of the event
loop, except `reserve`, which any thread may call.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from config.defaults import QUEUE_LENGTH, QUEUE_TIMEOUT_S, REQUEST_TIMEOUT_S, STEP_TIMEOUT_S
from server.link.admission import AdmissionLine
from server.link.child import Child
from server.link.engine_protocol import EngineStatus
from server.link.messages import (
    Administer,
    Administered,
    Answered,
    Cancel,
    EngineConfig,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Load,
    LoadFailed,
    Loading,
    Ping,
    Pong,
    Ready,
    Replan,
    Replanned,
    RequestEvent,
    Started,
    Stats,
)

MAX_STARTS_IN_A_ROW = 5
FIRST_RESTART_DELAY_S = 0.5
# Doubled with each start that fails, and never longer: a fault that has ended is over within seconds.
MOST_RESTART_DELAY_S = 2.0
# After that many starts in a row the engine is started so often, unless somebody asks for it.
GIVEN_UP_DELAY_S = 180.0
# How long to wait for descriptors, memory or a process of the system; having none is no death of the engine.
SCARCITY_DELAY_S = 2.0
# An engine that was ready for this long, or has completed a request, did not die of its start.
STABLE_S = 60.0
# An engine that has been silent for this part of the time that a step may take is not called ready any more.
DOUBTFUL = 0.25
# How long an administrator waits for a disk that hangs.
ADMINISTERED_S = 30.0
STOPPING = "the server is stopping"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deadlines:
    """How long things may take, in seconds.

    `queue_s` until a request starts, `request_s` until it is complete, `step_s` between two signs of life of
    an engine that has work or was asked something, `load_s` between two while it opens the model.
    """

    queue_s: float = QUEUE_TIMEOUT_S
    request_s: float = REQUEST_TIMEOUT_S
    step_s: float = STEP_TIMEOUT_S
    load_s: float = 600.0


class EngineProcess:
    """A child process that owns the model; restarted when it dies or hangs."""

    def __init__(
        self,
        config: EngineConfig,
        worker: str = "server.engine.worker",
        on_usage_error: Callable[[str], None] | None = None,
        on_given_up: Callable[[str], None] | None = None,
        deadlines: Deadlines | None = None,
        max_queue: int = QUEUE_LENGTH,
    ) -> None:
        self._config = config
        self._worker = worker
        self._on_usage_error = on_usage_error or log.error
        self._on_given_up = on_given_up  # called in place of further starts
        self._deadlines = deadlines or Deadlines()
        self._line = AdmissionLine(max_queue)
        self._status = EngineStatus("down", "the engine has not been started")
        self._requests: dict[str, asyncio.Queue[RequestEvent]] = {}
        self._child: Child | None = None
        self._timer: asyncio.TimerHandle | None = None  # until the next look at the child, or the next start
        self._asked_at: float | None = (
            None  # the first command since the last Pong, whoever still waits for it
        )
        self._ready_since: float | None = None
        self._num_deaths = 0  # in a row, without a completed request in between
        self._is_scarce = False  # the child ends because the system has no descriptor or memory for it
        self._is_closed = False
        self._stats: Stats | None = None  # the last ones, of this child or the one before
        self._num_starts = 0
        self._change = ""  # what a request said that failed because the checkpoint is another one

    @property
    def status(self) -> EngineStatus:
        """Whether requests are answered now, and what the engine has counted: that stays when it is down."""
        return replace(self._status, stats=self._stats, num_restarts=max(0, self._num_starts - 1))

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is a child."""
        return self._child.process.pid if self._child else None

    def health(self) -> EngineStatus:
        """The status, after asking the engine for a sign of life: it is not ready while it gives none."""
        self._ask()
        silent_s = self._silent_s()
        if self._status.state == "ready" and silent_s > DOUBTFUL * self._deadlines.step_s:
            return EngineStatus("down", f"the engine has not answered for {silent_s:.1f} s")
        if self._status.state == "ready" and self._change:
            return EngineStatus("down", self._change, failure="changed")
        return self._status

    def start(self) -> None:
        """Start the child. Call from the event loop."""
        self._status, self._asked_at = EngineStatus("loading", "the engine is starting"), None
        self._num_starts += 1
        loop = asyncio.get_running_loop()
        try:
            self._child = child = Child(self._worker, self._config)
        except OSError as error:
            self._start_later(f"the engine process could not be started ({error.strerror})", SCARCITY_DELAY_S)
            return
        child.send(Load(self._config))
        child.read_events(
            lambda event: loop.call_soon_threadsafe(self._on_event, child, event),
            lambda code: loop.call_soon_threadsafe(self._on_death, child, code),
        )
        self._look_after(child)

    def start_now(self) -> None:
        """Start an engine that is to be started later. One that runs is left alone."""
        if self._child is None and not self._is_closed:
            if self._timer:
                self._timer.cancel()
            self._num_deaths = 0
            self.start()

    async def close(self) -> None:
        """End the child, gently first."""
        self._is_closed = True
        if self._timer:
            self._timer.cancel()
        if child := self._child:
            self._child = None
            self.dismiss_all()
            await asyncio.to_thread(child.stop)

    def dismiss_all(self) -> None:
        """Tells all waiting requests that the server stops, and takes no more."""
        self._status = EngineStatus("down", STOPPING)
        self._fail_all(STOPPING)

    # requests

    def reserve(self) -> None:
        """Keep a place in the line for a request that comes at once. Raises BusyError where it is full."""
        self._line.reserve()

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        """Events of one request, the last of them Finished or Failed."""
        request_id = request.request_id
        if self._child is None or self._status.state != "ready":
            yield Failed(request_id, self._status.failure, self._status.text)
            return
        self._line.enter(request_id)
        events = self._send(request)
        started_at = asyncio.get_running_loop().time()
        deadline, is_over = started_at + self._deadlines.queue_s, False
        try:
            while not is_over:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await events.get()
                except TimeoutError:
                    event = self._too_late(request_id)
                    self.cancel(request_id)
                if isinstance(event, Started):
                    deadline = started_at + self._deadlines.request_s
                is_over = isinstance(event, Finished | Failed)
                yield event
        finally:
            if not is_over:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored. Whoever still waits for its events hears of it."""
        self._line.leave(request_id)
        events = self._requests.pop(request_id, None)
        if events is not None:
            events.put_nowait(Failed(request_id, "cancelled", "the request was cancelled"))
        if events is not None and self._child:
            self._child.send(Cancel(request_id))
            self._ask()

    async def administer(self, command: Administer) -> Administered | Failed:
        """Change what the prefix cache keeps, or list what is pinned there."""
        event = await self._answer_to(command, ADMINISTERED_S)
        assert isinstance(event, Administered | Failed), "there is one answer"
        return event

    async def replan(self, command: Replan) -> Replanned | Failed:
        """Go on with another budget or policy; what the child has taken, the next one is started with."""
        event = await self._answer_to(command, None)
        assert isinstance(event, Replanned | Failed), "there is one answer"
        return event

    async def _answer_to(self, command: Replan | Administer, limit_s: float | None) -> RequestEvent:
        """The one event that answers a command; Failed where there is no engine, or none comes in time."""
        name = command.request_id
        if self._child is None or self._status.state != "ready":
            return Failed(name, "died", self._status.text)
        events = self._send(command)
        try:
            async with asyncio.timeout(limit_s):
                return await events.get()
        except TimeoutError:
            return Failed(name, "timeout", f"the disk has not answered within {limit_s:g} s")
        finally:
            self._requests.pop(name, None)

    def _send(self, command: Generate | Replan | Administer) -> asyncio.Queue[RequestEvent]:
        assert self._child, "requests are sent to a child"
        events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._requests[command.request_id] = events
        self._child.send(command)
        self._ask()
        return events

    def _ask(self) -> None:
        """Have the engine answer: its silence counts from the first question, not from the last."""
        if self._child and self._status.state == "ready" and self._asked_at is None:
            self._asked_at = time.monotonic()
            self._child.send(Ping())

    def _silent_s(self) -> float:
        """How long an engine that owes a sign of life has given none; 0 for one that owes none."""
        is_loading = self._status.state == "loading"
        if self._child is None or not (is_loading or self._requests or self._asked_at is not None):
            return 0.0
        return time.monotonic() - max(self._child.heard_at, self._asked_at or 0.0)

    def _note_plan(self, event: Replanned) -> None:
        budget, policy = event.ram_budget_bytes, event.expert_policy
        self._config = replace(self._config, ram_budget_bytes=budget, expert_policy=policy)
        if info := self._status.info:
            self._status = replace(self._status, info=replace(info, memory_lines=event.memory_lines))

    def _too_late(self, request_id: str) -> Failed:
        if self._line.is_waiting(request_id):
            text = f"the request has not started within --queue-timeout ({self._deadlines.queue_s:g} s)"
            return Failed(request_id, "busy", text, self._line.retry_after_s)
        text = f"the request took longer than --request-timeout ({self._deadlines.request_s:g} s)"
        return Failed(request_id, "timeout", text)

    def _fail_all(self, reason: str) -> None:
        for request_id, events in self._requests.items():
            self._line.leave(request_id)
            events.put_nowait(Failed(request_id, "died", reason))
        self._requests.clear()

    # the child's life

    def _on_event(self, child: Child, event: Event) -> None:
        if child is not self._child:
            return
        match event:
            case Loading(fraction, text):
                self._status = EngineStatus("loading", text, fraction)
            case Ready(info, marks):
                if self._config.marks is not None:  # of the first start it is told with the plan
                    log.info("the engine is ready again")
                self._config = replace(self._config, marks=marks)
                self._ready_since = time.monotonic()
                self._status = EngineStatus("ready", info=info)
            case Stats():
                self._stats = event
            case LoadFailed():
                self._on_load_failed(event)
                child.kill()  # it ends by itself, unless that hangs, and then nobody would notice
            case Pong():
                self._asked_at = None
            case Heartbeat():
                pass  # the child was heard: that is all it says
            case _:
                self._on_request_event(event)

    def _on_load_failed(self, event: LoadFailed) -> None:
        self._is_scarce = event.is_scarce
        self._status = EngineStatus("down", event.message, failure="changed" if event.is_changed else "died")
        self._is_closed = self._is_closed or event.is_changed or event.is_usage_error  # a person must act
        if event.is_changed:
            log.error("%s", event.message)
        elif event.is_usage_error:
            self._on_usage_error(event.message)

    def _on_request_event(self, event: RequestEvent) -> None:
        match event:
            case Started(request_id):
                self._line.start(request_id)
            case Finished():
                self._num_deaths, self._change = 0, ""
            case Failed(kind="changed", message=message):
                self._change = message  # as long as no request succeeds
            case Replanned():
                self._note_plan(event)
        is_over = isinstance(event, Answered)
        if is_over:
            self._line.leave(event.request_id)
        events = (
            self._requests.pop(event.request_id, None) if is_over else self._requests.get(event.request_id)
        )
        if events:
            events.put_nowait(event)

    def _look_after(self, child: Child) -> None:
        """End a child that owes a sign of life and is silent; look again later."""
        if child is not self._child:
            return
        is_loading = self._status.state == "loading"
        limit_s = self._deadlines.load_s if is_loading else self._deadlines.step_s
        silent_s = self._silent_s()
        if silent_s > limit_s:
            reason = f"the engine gave no sign of life for {silent_s:.1f} s and was ended"
            self._status = EngineStatus("down", reason)
            self._fail_all(reason)
            child.kill()
            return
        interval_s = min(1.0, limit_s / 8)
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._look_after, child)

    def _on_death(self, child: Child, exit_code: int) -> None:
        if child is not self._child:
            return
        self._child = None
        reason = f"the engine process ended ({_describe_exit(exit_code)})"
        if self._status.state == "down":  # what happened is known already
            reason = self._status.text
        self._fail_all(reason)
        if self._timer:
            self._timer.cancel()
        if self._is_closed:
            return
        if self._is_scarce:
            self._is_scarce = False
            self._start_later(reason, SCARCITY_DELAY_S)
        else:
            self._start_again(reason)

    def _start_again(self, reason: str) -> None:
        """In a while; after many times not so soon, or not in this process."""
        if self._ready_since and time.monotonic() - self._ready_since > STABLE_S:
            self._num_deaths = 0
        self._ready_since = None
        self._num_deaths += 1
        if self._num_deaths < MAX_STARTS_IN_A_ROW:
            delay_s = FIRST_RESTART_DELAY_S * 2 ** (self._num_deaths - 1)
            self._start_later(reason, min(delay_s, MOST_RESTART_DELAY_S))
        elif self._on_given_up:
            self._status = EngineStatus("down", reason)
            self._on_given_up(f"{reason}; given up after {self._num_deaths} starts")
        else:
            self._start_later(f"{reason}; given up after {self._num_deaths} starts", GIVEN_UP_DELAY_S)

    def _start_later(self, reason: str, delay_s: float) -> None:
        text = f"{reason}; it is started again in {delay_s:g} s"
        self._status = EngineStatus("down", text)
        log.error("%s", text)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.start)


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
