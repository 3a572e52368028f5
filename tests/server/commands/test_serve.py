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
