"""The command `glmserve doctor [--parity | --json]`: runs checks, prints findings, writes the report.

A check that raises is a fault of that check alone. With `--parity` the checks run in a process of their own,
and each finding becomes a line of one JSON-lines file at once: a crash in a driver leaves the check's name.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from server.commands.doctor.finding import Check, Finding, Verdict
from server.link.child import engine_environment

REPORT = "glmserve-parity.jsonl"
PARITY = "server.commands.doctor.parity.parity_process"
Record = Callable[[dict[str, object]], None]


def doctor(settings: Settings, *, parity: bool, is_json: bool = False, directory: Path | None = None) -> int:
    """Runs the ordinary checks, or those of `--parity`; returns 1 if any finding is a fault.

    The report of `--parity` is written to `directory`, by default the current one; UsageError if it cannot.
    """
    if not parity:
        from server.commands.doctor.ordinary import CHECKS

        logging.getLogger().addHandler(logging.NullHandler())  # what a check finds it says itself
        findings: list[dict[str, object]] = []
        code = run_checks(CHECKS, settings, findings.append, is_quiet=is_json)
        if is_json:
            print(json.dumps([line for line in findings if "verdict" in line], indent=2))
        return code
    path = (directory or Path.cwd()) / REPORT
    try:
        path.write_text("", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report {path} cannot be written: {error.strerror}") from error
    code = run_parity(path)
    print(f"\nthe report is in {REPORT}; it holds no names and no paths")
    return code


def run_parity(path: Path, module: str = PARITY) -> int:
    """Runs the checks of `--parity` into this report; returns 1 for faults, of which a crash is one."""
    code = subprocess.run(
        [sys.executable, "-P", "-m", module, str(path)], env=engine_environment()
    ).returncode
    if code in (0, 1):
        return code
    text = f"the process ended with {code} in the check that began last: MLX or its driver crashed"
    print(f"{Verdict.FAULT:5}  {text}")
    with path.open("a", encoding="utf-8") as report:
        print(json.dumps({"verdict": Verdict.FAULT, "text": text}), file=report)
    return 1


def run_checks(checks: Sequence[Check], settings: Settings, record: Record, *, is_quiet: bool = False) -> int:
    """Runs the checks in order, prints each finding and hands it to `record`; returns the exit code.

    A fault that stops several checks, such as an absent checkpoint, is told once.
    """
    faults: set[str] = set()
    for check in checks:
        record({"check": check.title, "began": True})
        begun = time.perf_counter()
        for finding in _findings(check, settings):
            if finding.text in faults:
                continue
            if finding.verdict == Verdict.FAULT:
                faults.add(finding.text)
            if not is_quiet:
                print(f"{finding.verdict:5}  {check.title}: {finding.text}", flush=True)
            record({"check": check.title, **asdict(finding)})
        record({"check": check.title, "seconds": round(time.perf_counter() - begun, 2)})
    return 1 if faults else 0


def _findings(check: Check, settings: Settings) -> Iterator[Finding]:
    try:
        yield from check.run(settings)
    except UsageError as error:
        yield Finding(Verdict.FAULT, str(error))
    except Exception as error:  # the other checks still run
        yield Finding(Verdict.FAULT, f"the check itself failed: {type(error).__name__}: {error}")
