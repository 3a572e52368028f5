"""Guards for Apple's machines on a platform that is made up: calls are made there, nothing elsewhere."""

import logging
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from config.plan import NOT_MLX
from models.arithmetic import choose_arithmetic
from models.loading.loading import open_checkpoint
from server.engine import apple
from server.engine.backend import open_backend, plan_memory
from server.link.messages import EngineConfig, Event, Finished, Progress, Token, TokenScore, Usage
from tests.checkpoints import save_packed
from tests.tiny_glm import WIDER, make_weights

TOKEN = Token("a", TokenScore(1, 0.0))
PROGRESS = Progress("a", 1, 2)
FINISHED = Finished("a", "stop", Usage(1, 1))


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    return calls


def test_elsewhere_nothing_happens(wired: list[int]) -> None:
    apple.wire(10, "linux")
    assert wired == []
    assert apple.with_activity(print, "linux") is print


def test_trunk_and_slots_are_wired_up_to_what_the_system_allows(
    wired: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        apple.wire(700, "darwin")
        assert caplog.text == ""
        apple.wire(3000, "darwin")
    assert wired == [700, 1000]
    assert "iogpu.wired_limit_mb=1" in caplog.text


def test_a_system_that_refuses_to_wire_is_no_reason_to_stop(
    wired: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(nbytes: int) -> None:
        raise ValueError("macOS 15 is needed")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with caplog.at_level(logging.WARNING):
        apple.wire(700, "darwin")
    assert "macOS 15 is needed" in caplog.text


def test_tokens_keep_the_gpu_warm_and_any_progress_keeps_the_machine_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[Any] = []
    touched: list[str] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    monkeypatch.setattr(apple.KeepWarm, "touch", lambda self: touched.append("warm"))
    sent: list[Event] = []
    send = apple.with_activity(sent.append, "darwin")
    send(FINISHED)
    assert commands == []
    send(PROGRESS)
    assert touched == []
    send(TOKEN)
    send(TOKEN)
    assert sent == [FINISHED, PROGRESS, TOKEN, TOKEN]
    assert touched == ["warm", "warm"]
    assert [command[:2] for command in commands] == [["/usr/bin/caffeinate", "-i"]], "one lasts for a while"


def test_a_missing_caffeinate_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(command: list[str], **options: object) -> None:
        raise FileNotFoundError("caffeinate")

    monkeypatch.setattr(subprocess, "Popen", fail)
    awake = apple.KeepAwake()
    with caplog.at_level(logging.WARNING):
        awake.touch()
        awake.touch()
    assert caplog.text.count("may fall asleep") == 1


def test_the_machine_is_kept_awake_without_a_fork_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork copies the page tables of all that is mapped, 100 GB."""
    spawned: list[list[str]] = []

    def spawn(path: str, command: list[str], *rest: object, **options: object) -> int:
        spawned.append(command)
        return os.posix_spawnp("true", ["true"], os.environ)

    def fork(*rest: object) -> int:
        raise AssertionError("the process was forked")

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(subprocess, "_fork_exec", fork)
    awake = apple.KeepAwake()
    awake.touch()
    assert awake._process is not None
    awake._process.wait()
    assert [command[:2] for command in spawned] == [["/usr/bin/caffeinate", "-i"]]


@pytest.mark.parametrize("is_wanted", [False, True])
def test_memory_is_wired_only_where_that_was_asked_for_and_then_all_of_mlx(
    wired: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_wanted: bool
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10**12})
    monkeypatch.setattr(apple.wire, "__defaults__", ("darwin",))
    save_packed(tmp_path, WIDER, make_weights(WIDER, 0), lambda path: None)
    config = EngineConfig(tmp_path, True, 10**9, 64, "error", prefix_memory_bytes=0, wires_memory=is_wanted)
    open_backend(config, lambda *words: None)
    plan = plan_memory(open_checkpoint(tmp_path), choose_arithmetic(), config)
    wanted = sum(nbytes for name, nbytes in plan.lines.items() if name not in NOT_MLX)
    assert wired == ([pytest.approx(wanted, rel=0.2)] if is_wanted else [])
    assert wanted > plan.lines["trunk"] + plan.lines["experts"] + plan.lines["KV cache"]


def test_keep_warm_heats_while_it_is_touched_and_parks_after() -> None:
    beats, parked = threading.Semaphore(0), threading.Event()
    warm = apple.KeepWarm(lambda: beats.release, warm_s=0.05)
    warm.touch()
    assert beats.acquire(timeout=5)
    assert beats.acquire(timeout=5)
    for _ in range(500):
        if not warm._is_wanted.is_set():
            parked.set()
            break
        threading.Event().wait(0.01)
    assert parked.is_set()
    warm.touch()
    assert beats.acquire(timeout=5)


def test_the_heater_computes_on_a_thread_of_its_own() -> None:
    failures: list[Exception] = []

    def run() -> None:
        try:
            heat = apple.make_heater()
            heat()
            heat()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
