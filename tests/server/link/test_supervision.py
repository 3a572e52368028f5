"""An engine that hangs, or dies again and again, and lines that are too long: everybody is told."""

import asyncio
import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from config.errors import BusyError
from server.api.error_bodies import GenerationFailed
from server.link.admission import AdmissionLine
from server.link.child import Child
from server.link.messages import (
    EngineConfig,
    Failed,
    FailureKind,
    Finished,
    Generate,
    RequestEvent,
    Sampling,
    Started,
    Token,
)
from server.link.supervisor import GIVEN_UP_DELAY_S, MAX_STARTS_IN_A_ROW, Deadlines, EngineProcess
from tests.grids import few
from tests.server.link.fake_worker import FATAL_TOKEN
from tests.server.link.test_supervisor import collect, engine_of, ready, until

GREEDY = Sampling(temperature=0)


def failure(events: list[RequestEvent]) -> Failed:
    end = events[-1]
    assert isinstance(end, Failed)
    return end


@pytest.mark.slow
def test_a_step_that_never_ends_is_noticed_told_and_healed() -> None:
    async def scenario() -> None:
        async with engine_of("freezing", deadlines=Deadlines(step_s=1.0)) as engine:
            await ready(engine)
            pid, frozen_at = engine.pid, time.monotonic()
            frozen = asyncio.ensure_future(collect(engine, Generate("a", (FATAL_TOKEN,), 3, GREEDY)))
            await asyncio.sleep(0.1)
            behind = asyncio.ensure_future(collect(engine, Generate("b", (1,), 3, GREEDY)))
            for events in await asyncio.gather(frozen, behind):
                assert failure(events).kind == "died"
                assert "no sign of life" in failure(events).message
            assert time.monotonic() - frozen_at < 1.0 + 0.5
            assert engine.status.state == "down"
            assert "no sign of life" in engine.status.text
            await ready(engine)
            assert engine.pid != pid
            assert isinstance((await collect(engine, Generate("c", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.parametrize("patience_s", few([0.02, 0.1, 0.4], [0.1]))
@pytest.mark.parametrize("is_stopped_idle", [False, True])
@pytest.mark.slow
def test_a_stopped_engine_is_noticed_however_impatient_the_clients_are(
    patience_s: float, is_stopped_idle: bool
) -> None:
    async def scenario() -> None:
        async with engine_of("slow", deadlines=Deadlines(step_s=1.0)) as engine:
            await ready(engine)
            pid = engine.pid
            assert pid
            if not is_stopped_idle:
                asyncio.get_running_loop().call_later(0.1, os.kill, pid, signal.SIGSTOP)
                with suppress(TimeoutError):
                    await asyncio.wait_for(collect(engine, Generate("a", (1,), 60, GREEDY)), 0.15)
            else:
                os.kill(pid, signal.SIGSTOP)
            stopped_at = time.monotonic()
            number = 0
            while engine.pid == pid and time.monotonic() - stopped_at < 5:
                number += 1
                with suppress(TimeoutError):
                    request = Generate(f"b{number}", (1,), 3, GREEDY)
                    await asyncio.wait_for(collect(engine, request), patience_s)
                await asyncio.sleep(0.005)
            assert time.monotonic() - stopped_at < 1.0 + patience_s + 1.0
            await ready(engine)
            assert isinstance((await collect(engine, Generate("c", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.parametrize("pause_s", few([0.01, 0.05, 0.2], [0.05]))
@pytest.mark.slow
def test_health_asks_the_engine_itself(pause_s: float) -> None:
    async def scenario() -> None:
        async with engine_of("well", deadlines=Deadlines(step_s=1.2)) as engine:
            await ready(engine)
            for _ in range(5):
                assert engine.health().state == "ready"
                await asyncio.sleep(pause_s)
            pid, states = engine.pid, []
            assert pid
            os.kill(pid, signal.SIGSTOP)
            while engine.pid == pid:
                states.append(engine.health())
                await asyncio.sleep(pause_s)
            doubtful = [one for one in states if one.state == "down"]
            assert "has not answered for" in doubtful[0].text
            assert states[0].state == "ready"
            await ready(engine)
            assert engine.health().state == "ready"

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_long_layer_is_no_silence_where_the_loop_beats() -> None:
    """A layer takes 20 ms, and what was asked in it is answered behind it."""

    async def scenario() -> None:
        async with engine_of("slow", deadlines=Deadlines(step_s=4.0)) as engine:
            await ready(engine)
            work = asyncio.ensure_future(collect(engine, Generate("a", (1,), 30, GREEDY)))
            while not work.done():
                engine.cancel("unknown")
                assert engine.health().state == "ready"
                await asyncio.sleep(0.01)
            assert isinstance(work.result()[-1], Finished)

    asyncio.run(scenario())


CHANGES: list[Callable[[Path], object]] = [
    lambda folder: (folder / "model.safetensors").write_bytes(b"other"),
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "chat_template.jinja").write_text("x"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
def test_a_checkpoint_that_changed_is_not_served_unasked(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    async def scenario() -> None:
        folder = checkpoint_in(tmp_path)
        async with engine_of(str(folder)) as engine:
            await ready(engine)
            assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)
            change(folder)
            assert engine.pid
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.status.failure == "changed")
            assert "was changed while the server ran" in engine.status.text
            await asyncio.sleep(1.0)  # it is not started again either
            assert engine.health().state == "down"
            failed = failure(await collect(engine, Generate("b", (1,), 3, GREEDY)))
            assert failed.kind == "changed"
            assert not GenerationFailed.from_event(failed).can_retry

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_checkpoint_that_was_touched_is_served_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = checkpoint_in(tmp_path)
        async with engine_of(str(folder)) as engine:
            await ready(engine)
            for when in (1, 2):
                os.utime(folder / "model.safetensors", (when, when))
                pid = engine.pid
                assert pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda: engine.pid is None)
                await ready(engine)
                assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


def checkpoint_in(folder: Path) -> Path:
    """Files such as a checkpoint has; the fake worker reads none of them."""
    made = folder / "well"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text("{}")
    return made


@pytest.mark.parametrize("kind", ["changed", "disk", "engine"])
def test_health_is_not_ready_while_requests_fail_for_another_checkpoint(kind: FailureKind) -> None:
    async def scenario() -> None:
        async with engine_of("well") as engine:
            await ready(engine)
            child = engine._child
            assert child
            engine._on_event(child, Failed("x", kind, "the file was replaced"))
            assert engine.health().state == ("down" if kind == "changed" else "ready")
            assert engine.status.state == "ready", "what is in memory may still be answered"
            assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)
            assert engine.health().state == "ready"

    asyncio.run(scenario())


@pytest.mark.slow
def test_an_engine_that_works_long_is_not_taken_for_dead() -> None:
    """3 layers of 20 ms a step, 30 steps: twice the time that a single step may take."""

    async def scenario() -> None:
        async with engine_of("slow", deadlines=Deadlines(step_s=0.9)) as engine:
            await ready(engine)
            await asyncio.sleep(1.5)  # idle: no sign of life is due
            events = await collect(engine, Generate("a", (1,), 30, GREEDY))
            assert isinstance(events[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.slow
def test_an_engine_that_gets_ready_and_dies_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.link.supervisor.FIRST_RESTART_DELAY_S", 0.01)

    async def scenario() -> None:
        async with engine_of("mortal") as engine:
            await until(lambda: "given up" in engine.status.text, 30)
            assert engine.status.state == "down"
            assert f"(exit code 3); given up after {MAX_STARTS_IN_A_ROW} starts" in engine.status.text
            assert failure(await collect(engine, Generate("a", (1,), 3, GREEDY))).kind == "died"

    asyncio.run(scenario())


def test_an_engine_is_started_again_in_seconds_however_often_it_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that ends after the fourth death was over four seconds and a load later."""
    pauses_s: list[float] = []
    monkeypatch.setattr(EngineProcess, "_start_later", lambda self, reason, delay_s: pauses_s.append(delay_s))
    engine = EngineProcess(EngineConfig(Path("none"), False, 1, None, "error"))
    for _ in range(MAX_STARTS_IN_A_ROW):
        engine._start_again("it died")
    assert pauses_s == [0.5, 1.0, 2.0, 2.0, GIVEN_UP_DELAY_S]


@pytest.mark.parametrize(
    "number", few([errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN], [errno.EMFILE])
)
def test_an_engine_that_finds_no_descriptor_or_memory_has_not_died(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.link.supervisor.SCARCITY_DELAY_S", 0.01)
    monkeypatch.setattr("server.link.supervisor.FIRST_RESTART_DELAY_S", 0.01)
    (starts := tmp_path / "starts").touch()
    monkeypatch.setenv("STARTS", str(starts))

    async def scenario() -> None:
        async with engine_of(f"scarce {number}") as engine:
            await until(lambda: engine.status.state == "ready", 60)
            assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.parametrize("way", few(["time", "asked", "asked twice"], ["asked"]))
def test_an_engine_that_was_given_up_is_tried_again(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.link.supervisor.FIRST_RESTART_DELAY_S", 0.01)
    monkeypatch.setattr("server.link.supervisor.GIVEN_UP_DELAY_S", 0.5 if way == "time" else 600)
    (starts := tmp_path / "starts").touch()
    monkeypatch.setenv("STARTS", str(starts))

    async def scenario() -> None:
        async with engine_of("fragile") as engine:
            await until(lambda: "given up" in engine.status.text, 30)
            for _ in range({"time": 0, "asked": 1, "asked twice": 2}[way]):
                engine.start_now()
            await until(lambda: engine.status.state == "ready", 30)
            pid = engine.pid
            engine.start_now()
            await asyncio.sleep(0.1)
            assert engine.pid == pid, "one that runs is left alone"
            assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.slow
def test_where_a_service_starts_it_again_the_server_is_told_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.link.supervisor.FIRST_RESTART_DELAY_S", 0.01)
    monkeypatch.setattr("server.link.supervisor.GIVEN_UP_DELAY_S", 0.01)
    told: list[str] = []

    async def scenario() -> None:
        async with engine_of("broken", on_given_up=told.append) as engine:
            await until(lambda: told, 30)
            await asyncio.sleep(0.2)
            assert engine.pid is None

    asyncio.run(scenario())
    assert len(told) == 1
    assert told[0] == f"RuntimeError: out of memory; given up after {MAX_STARTS_IN_A_ROW} starts"


def test_an_engine_for_which_there_is_no_process_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.link.supervisor.FIRST_RESTART_DELAY_S", 0.01)
    monkeypatch.setattr("server.link.supervisor.SCARCITY_DELAY_S", 0.01)
    errors = [errno.EAGAIN, errno.ENOMEM, errno.ENFILE, *[errno.EMFILE] * 9]
    failures = [OSError(number, os.strerror(number)) for number in errors]

    def make(*given: Any) -> Child:
        if failures:
            raise failures.pop()
        return Child(*given)

    monkeypatch.setattr("server.link.supervisor.Child", make)

    async def scenario() -> None:
        async with engine_of("well") as engine:
            assert engine.status.state == "down"
            assert "could not be started (Too many open files)" in engine.status.text
            await ready(engine)
            assert isinstance((await collect(engine, Generate("a", (1,), 3, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_request_that_does_not_start_in_time_is_refused_with_the_time_to_come_back() -> None:
    async def scenario() -> None:
        async with engine_of("slow", deadlines=Deadlines(queue_s=0.3)) as engine:
            await ready(engine)
            first = asyncio.ensure_future(collect(engine, Generate("a", (1,), 40, GREEDY)))
            await asyncio.sleep(0.1)
            events = await collect(engine, Generate("b", (1,), 2, GREEDY))
            assert failure(events).kind == "busy"
            assert failure(events).retry_after_s
            assert isinstance((await first)[-1], Finished)
            assert isinstance((await collect(engine, Generate("c", (1,), 2, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


def test_a_request_that_takes_too_long_is_ended_and_its_place_is_free() -> None:
    async def scenario() -> None:
        async with engine_of("slow", deadlines=Deadlines(request_s=0.5)) as engine:
            await ready(engine)
            events = await collect(engine, Generate("a", (1,), 60, GREEDY))
            assert failure(events).kind == "timeout"
            assert sum(isinstance(event, Token) for event in events) > 2
            assert isinstance((await collect(engine, Generate("b", (1,), 2, GREEDY)))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_full_line_refuses_and_takes_again_when_somebody_has_started() -> None:
    async def scenario() -> None:
        async with engine_of("slow", max_queue=2) as engine:
            await ready(engine)
            tasks = []
            for name in "abc":
                engine.reserve()
                tasks.append(asyncio.ensure_future(collect(engine, Generate(name, (1,), 8, GREEDY))))
                await asyncio.sleep(0.1)
            with pytest.raises(BusyError, match="2 requests wait already; try again in"):
                engine.reserve()
            await tasks[0]
            await asyncio.sleep(0.1)
            engine.reserve()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_time_to_come_back_follows_the_measured_speed_and_has_a_ceiling() -> None:
    clock = Clock()
    line = AdmissionLine(10, clock)
    assert line.retry_after_s == 5, "nothing is measured yet"
    for name in "abcdefgh":
        line.enter(name)
    for name in "abcd":
        clock.now_s += 3
        line.start(name)
    assert line.retry_after_s == 3 * (4 + 1)
    clock.now_s += 10_000
    assert line.retry_after_s == 120


def test_a_reservation_that_nobody_comes_for_is_given_away() -> None:
    clock = Clock()
    line = AdmissionLine(1, clock)
    line.reserve()
    with pytest.raises(BusyError):
        line.reserve()
    clock.now_s += 6
    line.reserve()


def test_places_are_given_back_however_a_request_ends() -> None:
    async def scenario() -> None:
        async with engine_of("slow", max_queue=1) as engine:
            await ready(engine)
            running = asyncio.ensure_future(collect(engine, Generate("a", (1,), 40, GREEDY)))
            await asyncio.sleep(0.1)
            for _ in range(5):  # each takes the only place, and leaves while it waits
                engine.reserve()
                waiting = engine.generate(Generate("b", (1,), 2, GREEDY))
                task = asyncio.ensure_future(anext(waiting))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await waiting.aclose()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            engine.reserve()
            events = await collect(engine, Generate("c", (1,), 2, GREEDY))
            assert isinstance(events[0], Started)
            await until(lambda: is_empty(engine))

    asyncio.run(scenario())


def is_empty(engine: EngineProcess) -> bool:
    stats = engine.status.stats
    return stats is not None and stats.values["running"] == stats.values["waiting"] == 0
