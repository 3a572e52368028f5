"""The command `glmserve doctor [--parity | --json]`: runs checks, prints findings, writes the report.

A check that raises is a fault of that check alone. With `--parity` each finding also becomes a line of one
JSON-lines file at once, so that a crash inside a driver leaves the name of the check that it happened in.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from server.commands.doctor.finding import Check, Finding, Verdict
from server.version import VERSION

REPORT = "glmserve-parity.jsonl"
Record = Callable[[dict[str, object]], None]


def doctor(settings: Settings, *, parity: bool, is_json: bool = False, directory: Path | None = None) -> int:
    """Runs the ordinary checks, or those of `--parity`; returns 1 if any finding is a fault.

    The report of `--parity` is written to `directory`, by default the current one; UsageError if it cannot.
    """
    if not parity:
        from server.commands.doctor.ordinary import CHECKS

        findings: list[dict[str, object]] = []
        code = run_checks(CHECKS, settings, findings.append, is_quiet=is_json)
        if is_json:
            print(json.dumps([line for line in findings if "verdict" in line], indent=2))
        return code
    from server.commands.doctor.parity.parity_checks import PARITY_CHECKS

    path = (directory or Path.cwd()) / REPORT
    with ExitStack() as stack:
        try:
            report = stack.enter_context(path.open("w", encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"the report {path} cannot be written: {error.strerror}") from error

        def record(line: dict[str, object]) -> None:
            print(json.dumps(line), file=report, flush=True)

        record({"glmserve": VERSION})
        code = run_checks(PARITY_CHECKS, settings, record)
    print(f"\nthe report is in {REPORT}; it holds no names and no paths")
    return code


def run_checks(checks: Sequence[Check], settings: Settings, record: Record, *, is_quiet: bool = False) -> int:
    """Runs the checks in order, prints each finding and hands it to `record`; returns the exit code."""
    num_faults = 0
    for check in checks:
        record({"check": check.title, "began": True})
        begun = time.perf_counter()
        for finding in _findings(check, settings):
            num_faults += finding.verdict == Verdict.FAULT
            if not is_quiet:
                print(f"{finding.verdict:5}  {check.title}: {finding.text}", flush=True)
            record({"check": check.title, **asdict(finding)})
        record({"check": check.title, "seconds": round(time.perf_counter() - begun, 2)})
    return 1 if num_faults else 0


def _findings(check: Check, settings: Settings) -> Iterator[Finding]:
    try:
        yield from check.run(settings)
    except UsageError as error:
        yield Finding(Verdict.FAULT, str(error))
    except Exception as error:  # the other checks still run
        yield Finding(Verdict.FAULT, f"the check itself failed: {type(error).__name__}: {error}")
