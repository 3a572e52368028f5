"""The supervisor in every order of what can happen to it, up to a depth: no state is without a way out.

Time is virtual and the child a fake, so that thousands of orders take seconds. From each state that is
reached the world turns good: the child starts, answers and finishes. Then every request must end, and a new
one be answered, in bounded time.
"""

import asyncio
import selectors
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.link import supervisor
from server.link.messages import (
    Cancel,
    Command,
    EngineConfig,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    LoadFailed,
    ModelInfo,
    Ping,
    Pong,
    Ready,
    RequestEvent,
    Started,
    Usage,
)
from server.link.supervisor import GIVEN_UP_DELAY_S, Deadlines, EngineProcess

DEPTH = 6
MOST_REQUESTS = 2
DEADLINES = Deadlines(queue_s=30.0, request_s=90.0, step_s=20.0, load_s=40.0)
# Rare starts, then a load and an answer.
MOST_S = 2 * GIVEN_UP_DELAY_S + DEADLINES.load_s + DEADLINES.request_s


class _Jump(selectors.SelectSelector):
    """Waits for nothing: the time of the next timer comes at once."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        assert events or timeout is not None, "nothing will ever happen again"
        if not events and timeout and timeout > 0:
            self.now_s += timeout
        return events


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jump = _Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.now_s


class _Child:
    """A child that does only what it is told to."""

    def __init__(self, world: "_World") -> None:
        if world.spawn_fails:
            raise OSError(24, "Too many open files")
        self.world, self.is_dead, self.is_hung = world, False, False
        self.process = SimpleNamespace(pid=1)
        self.heard_at = world.loop.time()
        self.open: list[str] = []  # requests that it was sent
        self.num_pings = 0
        world.child = self

    def send(self, command: Command) -> None:
        match command:
            case Generate(request_id):
                self.open.append(request_id)
            case Cancel(request_id) if request_id in self.open:
                self.open.remove(request_id)
            case Ping():
                self.num_pings += 1
        if self.world.is_good:
            self.world.loop.call_soon(self.be_good)

    def read_events(self, on_event: Callable[[Event], None], on_death: Callable[[int], None]) -> None:
        self._on_event, self._on_death = on_event, on_death
        if self.world.is_good:
            self.world.loop.call_soon(self.be_good)

    def say(self, event: Event) -> None:
        if not (self.is_dead or self.is_hung):
            self.heard_at = self.world.loop.time()
            self._on_event(event)

    def die(self, code: int = 1) -> None:
        if not self.is_dead:
            self.is_dead = True
            self._on_death(code)

    def kill(self) -> None:
        self.world.loop.call_soon(self.die, -9)

    def stop(self) -> None:
        """Ends."""

    def be_good(self) -> None:
        """Does all that it owes."""
        if self.is_dead or self.is_hung:
            return
        if self.world.engine.status.state == "loading":
            self.say(Ready(ModelInfo(10, 100)))
        while self.num_pings:
            self.num_pings -= 1
            self.say(Pong())
        while self.open:
            name = self.open.pop(0)
            self.say(Started(name))
            self.say(Finished(name, "stop", Usage(1, 1)))


class _World:
    """One run of a supervisor, its clients and its child."""

    def __init__(self, loop: _VirtualLoop) -> None:
        self.loop = loop
        self.child: _Child | None = None
        self.spawn_fails = self.is_good = False
        self.ends: dict[str, list[RequestEvent]] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        config = EngineConfig(Path("none"), False, 1, None, "error")
        self.engine = EngineProcess(config, deadlines=DEADLINES, max_queue=4)

    async def client(self, name: str) -> None:
        async for event in self.engine.generate(Generate(name, (1,), 1)):
            self.ends.setdefault(name, []).append(event)

    def ask(self) -> None:
        name = f"r{len(self.tasks)}"
        self.tasks[name] = self.loop.create_task(self.client(name))

    def open_tasks(self) -> list[asyncio.Task[None]]:
        return [task for task in self.tasks.values() if not task.done()]

    def act(self, action: str) -> bool:
        """Do it; False where it cannot happen now."""
        child = self.child if self.child and not self.child.is_dead else None
        if child and action in CHILDS:
            return self._have_child(child, action)
        match action:
            case "ask" if len(self.open_tasks()) < MOST_REQUESTS:
                self.ask()
            case "leave" if self.open_tasks():
                self.open_tasks()[0].cancel()
            case "start now" if child is None:
                self.engine.start_now()
            case "no descriptors":
                self.spawn_fails = not self.spawn_fails
            case _:
                return action.startswith("wait")
        return True

    def _have_child(self, child: _Child, action: str) -> bool:
        match action:
            case "load" if self.engine.status.state == "loading":
                child.say(Ready(ModelInfo(10, 100)))
            case "cannot load" if self.engine.status.state == "loading":
                child.say(LoadFailed("no memory", is_usage_error=False))
            case "die":
                child.die()
            case "begin" if child.open:
                child.say(Started(child.open[0]))
            case "finish" if child.open:
                child.say(Finished(child.open.pop(0), "stop", Usage(1, 1)))
            case "fail" if child.open:
                child.say(Failed(child.open.pop(0), "disk", "EIO"))
            case "pong" if child.num_pings:
                child.num_pings -= 1
                child.say(Pong())
            case "hang" if not child.is_hung:
                child.is_hung = True
            case "forget" if child.open:
                child.open.clear()
            case "beat":
                child.say(Heartbeat())
            case _:
                return False
        return True

    def state(self) -> tuple[Any, ...]:
        """What the future depends on, but for times."""
        engine, child = self.engine, self.child
        return (
            engine.status.state, engine._num_deaths, engine._asked_at is None, len(engine._requests),
            engine._is_scarce, engine._line.num_waiting, child is not None and not child.is_dead,
            child is not None and (len(child.open), min(child.num_pings, 1), child.is_hung),
            len(self.open_tasks()),
            self.spawn_fails, engine._timer is not None and not engine._timer.cancelled(),
            engine._child is None,
        )  # fmt: skip


CHILDS = ("load", "cannot load", "die", "begin", "finish", "fail", "pong", "beat", "hang", "forget")
ACTIONS = ("ask", "leave", "start now", "no descriptors", "wait 1", "wait 25", *CHILDS)


async def _play(world: _World, actions: tuple[str, ...]) -> bool:
    world.engine.start()
    await _settle()
    for action in actions:
        if not world.act(action):
            return False
        await asyncio.sleep(float(action.removeprefix("wait ")) if action.startswith("wait") else 0)
        await _settle()
    return True


async def _settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def _find_way_out(world: _World) -> None:
    """The world is good from now on: all that began ends, and what comes is answered."""
    world.is_good, world.spawn_fails = True, False
    if world.child and not world.child.is_dead:
        world.child.be_good()
    until_s = world.loop.time() + MOST_S
    number = 0
    while world.loop.time() < until_s:
        name = f"way out {number}"
        world.tasks[name] = world.loop.create_task(world.client(name))
        await asyncio.sleep(2.0)
        number += 1
        is_answered = name in world.ends and isinstance(world.ends[name][-1], Finished)
        if not world.open_tasks() and is_answered:
            break
    assert is_answered, "a new request is never answered"
    assert not world.open_tasks(), "a request never ends"
    for events in world.ends.values():
        assert sum(isinstance(event, Finished | Failed) for event in events) <= 1, "a request ended twice"
    assert not world.engine._requests
    assert not world.engine._line.num_waiting


def explore(depth: int) -> tuple[int, list[str]]:
    """Every order up to a depth, states that were seen before left out; how many, and those without a way."""
    seen: set[tuple[Any, ...]] = set()
    stuck: list[str] = []
    frontier: list[tuple[str, ...]] = [()]
    num_played = 0
    for _ in range(depth + 1):
        following: list[tuple[str, ...]] = []
        for actions in frontier:
            num_played += 1
            found, state = _run(actions)
            if state is None or state in seen:
                continue
            seen.add(state)
            if found:
                stuck.append(f"{' > '.join(actions)}: {found}")
            following += [(*actions, action) for action in ACTIONS]
        frontier = following
    return num_played, stuck


def _run(actions: tuple[str, ...]) -> tuple[str, tuple[Any, ...] | None]:
    """Why there is no way out, and the state after these actions; None where they cannot happen."""
    loop = _VirtualLoop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "time", SimpleNamespace(monotonic=loop.time))
        world = _World(loop)
        patch.setattr(supervisor, "Child", lambda worker, config: _Child(world))
        try:
            if not loop.run_until_complete(_play(world, actions)):
                return "", None
            state = world.state()
            try:
                assert world.engine._child or not world.engine._requests, "a request waits for no child"
                loop.run_until_complete(_find_way_out(world))
            except AssertionError as error:
                return str(error).splitlines()[0], state
            return "", state
        finally:
            _close(loop, world)


def _close(loop: _VirtualLoop, world: _World) -> None:
    for task in world.open_tasks():
        task.cancel()
    if world.engine._timer:
        world.engine._timer.cancel()
    loop.run_until_complete(_settle())
    loop.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.slow
def test_every_state_of_the_supervisor_has_a_way_out() -> None:
    num_played, stuck = explore(DEPTH)
    print(f"{num_played} orders up to {DEPTH} events")
    assert num_played > 800
    assert stuck == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["_fail_all", "_start_later", "cancel", "_look_after"])
def test_a_planted_fault_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that nobody ends or forgets, an engine that nobody starts, silence that nobody notices."""
    monkeypatch.setattr(EngineProcess, method, lambda self, *given: None)
    _, stuck = explore(5)
    assert stuck
