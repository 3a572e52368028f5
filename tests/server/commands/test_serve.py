"""How a server is started and ended by what surrounds it: limits of the system, service units."""

import asyncio
import errno
import logging
import resource
import subprocess
import sys

import pytest

from config.errors import GaveUp, UsageError
from server.api.doors import raise_descriptor_limit
from server.cli import COMMANDS, Command, main
from server.commands.http_server import Complaints
from server.commands.serve import is_service
from server.commands.start_lines import tell_start
from server.link.engine_protocol import EngineStatus
from server.link.messages import ModelInfo, Stats
from server.logs import set_up_logging


@pytest.mark.parametrize(("soft", "hard"), [(256, 1024), (64, 4096), (1000, 1000)])
def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(soft: int, hard: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from server.api.doors import raise_descriptor_limit\n"
        "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(hard)] * 3


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_descriptor_limit() == 256


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"INVOCATION_ID": "8c6a"}, True),
        ({"XPC_SERVICE_NAME": "local.glmserve"}, True),
        ({"XPC_SERVICE_NAME": "0"}, False),
        ({"XPC_SERVICE_NAME": "application.com.apple.Terminal.1152921500311884"}, False),
    ],
)
def test_a_service_unit_is_told_from_a_terminal(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INVOCATION_ID", "XPC_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_service() == expected


@pytest.mark.parametrize(("error", "code"), [(GaveUp("it died"), 75), (UsageError("no model"), 2)])
def test_the_exit_code_says_whether_another_start_may_help(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "serve", Command("", fail))
    assert main([]) == code
    assert capsys.readouterr().err == f"glmserve: {error}\n"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_clients_that_cannot_be_accepted_are_mentioned_once(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    complaints = Complaints()
    with caplog.at_level(logging.ERROR):
        for _ in range(5000):
            complaints(loop, {"message": "accept failed", "exception": OSError(number, "none left")})
        assert [record.getMessage() for record in caplog.records] == ["accept failed: none left"]
        complaints(loop, {"message": "another", "exception": ValueError("x")})
    assert "another" in caplog.text
    loop.close()


class Opening:
    """As much of an engine as is asked at a start: it loads for some looks, then it is ready."""

    def __init__(self) -> None:
        values = {"budget_bytes": 100e9, "planned.trunk": 11e9, "planned.experts": 70e9, "planned.ring": 0.0}
        values |= {"slots": 4500.0, "probe_bytes_per_s": 7e9}
        info = ModelInfo(320, 32_768, forecast="about 2.1 tokens/s for one agent")
        loading = [EngineStatus("loading", f"trunk, file {number} of 4", number / 4) for number in range(4)]
        self._states = [*loading, EngineStatus("ready", info=info, stats=Stats(values))]

    @property
    def status(self) -> EngineStatus:
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]


def start_of(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> None:
    monkeypatch.setattr("server.commands.start_lines.LOOK_S", 0.001)
    monkeypatch.setattr("server.commands.start_lines.LINE_S", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    asyncio.run(tell_start(Opening(), "z-ai/glm-5.2", "http://127.0.0.1:8080/"))  # type: ignore[arg-type]


def test_the_start_tells_of_model_plan_slots_disk_speed_and_page(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    start_of(monkeypatch, is_terminal=False)
    assert caplog.messages == [
        "loading 0 %: trunk, file 0 of 4",
        "loading 25 %: trunk, file 1 of 4",
        "loading 50 %: trunk, file 2 of 4",
        "loading 75 %: trunk, file 3 of 4",
        "ready: z-ai/glm-5.2, context 32768 tokens",
        "plan: 100.0 GB = trunk 11.0 GB, experts 70.0 GB",
        "slots: 4500 experts fit in memory; the disk reads 7.0 GB/s",
        "expected: about 2.1 tokens/s for one agent",
        "what happens now: http://127.0.0.1:8080/",
    ]


def test_a_terminal_gets_a_bar_while_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    caplog.set_level("INFO")
    start_of(monkeypatch, is_terminal=True)
    assert "file" in capsys.readouterr().err
    assert not [line for line in caplog.messages if line.startswith("loading")], "it is not told twice"
    assert len(caplog.messages) == 5


@pytest.mark.parametrize(("is_terminal", "no_color"), [(True, ""), (True, "1"), (False, "")])
def test_a_terminal_gets_colours_unless_it_wants_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool, no_color: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    before = logging.root.handlers[:]
    try:
        set_up_logging("info", "text")
        logging.getLogger("x").warning("the disk is slow")
    finally:
        logging.root.handlers[:] = before
    told = capsys.readouterr().err
    assert "the disk is slow" in told
    assert ("\x1b[" in told) == (is_terminal and not no_color)
