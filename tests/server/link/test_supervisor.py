"""The engine as a process: answers, deaths, and never an orphan."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.link.messages import EngineConfig, Failed, Finished, Generate, RequestEvent, Sampling, Token
from server.link.supervisor import EngineProcess

ROOT = Path(__file__).parents[3]
GREEDY = Sampling(temperature=0)


def config(kind: str) -> EngineConfig:
    return EngineConfig(Path(kind), False, 10**9, None, "error")


@asynccontextmanager
async def engine_of(kind: str, **options: Any) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(config(kind), worker="tests.server.link.fake_worker", **options)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def until(is_true: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)


async def ready(engine: EngineProcess) -> None:
    await until(lambda: engine.status.state == "ready")


async def collect(engine: EngineProcess, request: Generate) -> list[RequestEvent]:
    return [event async for event in engine.generate(request)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_answers_come_through_the_pipe_and_two_requests_do_not_mix() -> None:
    async def scenario() -> None:
        async with engine_of("plain") as engine:
            early = await collect(engine, Generate("early", (1,), 3, GREEDY))
            assert isinstance(early[0], Failed)
            await ready(engine)
            assert engine.status.info
            assert engine.status.info.context_length == 64
            requests = [Generate("a", (1,), 3, GREEDY), Generate("b", (20,), 3, GREEDY)]
            first, second = await asyncio.gather(*(collect(engine, request) for request in requests))
            assert [item.score.token_id for item in first if isinstance(item, Token)] == [2, 3, 4]
            assert [item.score.token_id for item in second if isinstance(item, Token)] == [21, 22, 23]

    asyncio.run(scenario())


def test_closing_the_iterator_cancels_at_the_engine() -> None:
    async def scenario() -> None:
        async with engine_of("busy") as engine:
            await ready(engine)
            stuck = engine.generate(Generate("a", (1,), 30, GREEDY))
            waiting = asyncio.ensure_future(anext(stuck))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await stuck.aclose()
            assert engine._requests == {}
            assert engine.pid
            os.kill(engine.pid, signal.SIGKILL)

    asyncio.run(scenario())


def test_the_death_of_the_engine_fails_what_is_in_flight_and_it_is_started_again() -> None:
    async def scenario() -> None:
        async with engine_of("busy") as engine:
            await ready(engine)
            pid = engine.pid
            assert pid
            running = asyncio.ensure_future(collect(engine, Generate("a", (1,), 3, GREEDY)))
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            *_, event = await asyncio.wait_for(running, 10)
            assert isinstance(event, Failed)
            assert (event.kind, event.message) == ("died", "the engine process ended (signal 9)")
            assert engine.status.state == "down"
            await ready(engine)
            assert engine.pid != pid

    asyncio.run(scenario())


def test_a_checkpoint_that_cannot_be_used_is_reported_and_not_tried_again() -> None:
    async def scenario() -> None:
        faults: list[str] = []
        async with engine_of("unusable", on_usage_error=faults.append) as engine:
            await until(lambda: engine.pid is None)
            assert faults == ["this checkpoint is of no use"]
            assert engine.status.text == "this checkpoint is of no use"

    asyncio.run(scenario())


def test_a_start_that_fails_otherwise_is_tried_again_and_the_reason_can_be_read() -> None:
    async def scenario() -> None:
        async with engine_of("broken") as engine:
            await until(lambda: "started again" in engine.status.text)
            assert "out of memory" in engine.status.text

    asyncio.run(scenario())


PARENT = """
import asyncio, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from server.link.messages import EngineConfig, Generate
from server.link.supervisor import EngineProcess

async def main():
    engine = EngineProcess(EngineConfig(Path("busy"), False, 10**9, None, "error"),
                           worker="tests.server.link.fake_worker")
    engine.start()
    while engine.status.state != "ready":
        await asyncio.sleep(0.01)
    print(engine.pid, flush=True)
    async for event in engine.generate(Generate("a", (1,), 3)):
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_engine_in_a_long_step_ends_within_two_seconds_of_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_alive(pid)
        parent.send_signal(number)
        died_at = time.monotonic()
        parent.wait()
        while is_alive(pid) and time.monotonic() < died_at + 5:
            time.sleep(0.02)
        assert time.monotonic() - died_at < 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_http_process_do_not_end_the_engine(number: signal.Signals) -> None:
    """A terminal that is closed, a service manager and Ctrl-C send them to all processes."""

    async def scenario() -> None:
        async with engine_of("plain") as engine:
            await ready(engine)
            pid = engine.pid
            assert pid
            os.kill(pid, number)
            events = await collect(engine, Generate("a", (1,), 1, GREEDY))
            assert isinstance(events[-1], Finished)
            assert engine.pid == pid

    asyncio.run(scenario())


def test_finished_is_the_last_event() -> None:
    async def scenario() -> None:
        async with engine_of("plain") as engine:
            await ready(engine)
            events = await collect(engine, Generate("a", (1,), 1, GREEDY))
            assert isinstance(events[-1], Finished)

    asyncio.run(scenario())


def test_folders_where_the_server_was_started_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('a foreign folder was imported')")
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        async with engine_of("plain") as engine:
            await ready(engine)

    asyncio.run(scenario())
