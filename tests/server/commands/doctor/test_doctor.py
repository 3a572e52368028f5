"""The frame of `glmserve doctor`: every check runs, a fault is an exit code, a report survives a crash."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.errors import CheckpointError
from config.settings import Settings
from server.cli import main
from server.commands.doctor.doctor_command import run_checks
from server.commands.doctor.finding import Check, Finding, Verdict


def _says(*findings: Finding, error: Exception | None = None) -> Check:
    def run(settings: Settings) -> Iterator[Finding]:
        yield from findings
        if error:
            raise error

    return Check("thing", run)


GOOD = Finding(Verdict.GOOD, "fine")


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([], 0),
        ([_says(GOOD)], 0),
        ([_says(Finding(Verdict.NOTE, "slow"))], 0),
        ([_says(Finding(Verdict.FAULT, "bad")), _says(GOOD)], 1),
        ([_says(GOOD, error=CheckpointError("none")), _says(GOOD)], 1),
        ([_says(GOOD, error=ZeroDivisionError()), _says(GOOD)], 1),
    ],
)
def test_the_exit_code_is_one_if_any_finding_is_a_fault(checks: list[Check], code: int) -> None:
    lines: list[dict[str, object]] = []
    assert run_checks(checks, Settings(), lines.append) == code
    assert sum("seconds" in line for line in lines) == len(checks), "a check that raises ends no other"


def test_plain_doctor_looks_at_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "checkpoint: complete" in capsys.readouterr().out
    assert main(["doctor", "--model", "/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().out


def test_a_report_names_the_check_that_never_came_back(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []
    with pytest.raises(KeyboardInterrupt):
        run_checks([_says(GOOD), _says(error=KeyboardInterrupt())], Settings(), lines.append)  # type: ignore[arg-type]
    assert lines[-1] == {"check": "thing", "began": True}
    assert all(json.dumps(line) for line in lines)
