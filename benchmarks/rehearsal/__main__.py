"""GLM-5.2 at full size without its weights, from plan to shutdown: `make rehearsal` or
`python -m benchmarks.rehearsal --folder DIR [--small-trunk] [--ram-budget 14G] [--layers 78] [--only ACT]`.

Writes a checkpoint of true shapes (`benchmarks.rehearsal.checkpoint`), then plays the acts of
`benchmarks.rehearsal.steps` with the product's own commands, the server under a hard limit where there is a
memory cgroup. What each act saw goes to DIR's report, as JSON and as Markdown; acts played in several calls
are put together there. Ends with 1 if an act failed.

Two cores take minutes for a token of all layers and hours for a prompt: `--layers 6` plays the whole piece in
minutes. With a GPU: `--ram-budget 100G`.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.checkpoint import FORMATS, on_disk_bytes, write
from benchmarks.rehearsal.stage import Stage
from benchmarks.rehearsal.steps import ACTS, Facts, Skipped
from config.sizes import format_size, physical_memory_bytes

Report = dict[str, Any]


def play(stage: Stage, names: list[str], path: Path, report: Report) -> bool:
    """The acts in their order; whether none failed."""
    try:
        for name in names:
            began = time.monotonic()
            facts: Facts = {}
            try:
                facts, outcome = ACTS[name](stage), "passed"
            except Skipped as why:
                outcome = f"skipped: {why}"
            except Exception as error:  # the end of this act; the others are played
                outcome = f"failed: {type(error).__name__}: {error}"
            seconds = round(time.monotonic() - began, 1)
            report["acts"][name] = {"outcome": outcome, "seconds": seconds, "facts": facts}
            print(
                f"{name}: {outcome} ({seconds} s)", *(f"\n    {k}: {v}" for k, v in facts.items()), flush=True
            )
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
            path.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    finally:
        stage.leave()
    return not any(act["outcome"].startswith("failed") for act in report["acts"].values())


def as_markdown(report: Report) -> str:
    """The report for people."""
    lines = [f"{key}: {value}  " for key, value in report.items() if key != "acts"]
    lines += ["", "| act | outcome | seconds | what was seen |", "|---|---|---|---|"]
    for name, act in report["acts"].items():
        facts = "; ".join(f"{key} {_said(key, value)}" for key, value in act["facts"].items())
        lines.append(f"| {name} | {act['outcome']} | {act['seconds']} | {facts} |")
    return "\n".join(lines) + "\n"


def _said(key: str, value: object) -> str:
    is_size = isinstance(value, int) and value > 10**5 and "slots" not in key
    return format_size(value) if is_size and isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/rehearsal"))
    parser.add_argument("--format", choices=FORMATS, default="mxfp4", dest="form")
    parser.add_argument("--layers", type=int, default=78)
    parser.add_argument("--small-trunk", action="store_true", help="2 bits, for a machine of 24 GB")
    parser.add_argument("--ram-budget", default="80%")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=ACTS, default=list(ACTS), metavar="ACT")
    parser.add_argument("--afresh", action="store_true", help="forgets the report of earlier calls")
    given = parser.parse_args()
    name = f"{given.form}-{given.layers}{'-small' if given.small_trunk else ''}"
    folder, path = given.folder.resolve() / name, given.folder.resolve() / f"{name}.json"
    report: Report = {"acts": {}}
    if path.exists() and not given.afresh:
        report = json.loads(path.read_text(encoding="utf-8"))
    if not (folder / "tokenizer.json").exists():
        began = time.monotonic()
        write(folder, given.form, given.layers, given.small_trunk)
        report["written"] = f"{format_size(on_disk_bytes(folder))} in {time.monotonic() - began:.0f} s"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the server ends as well
    stage = Stage(folder, given.ram_budget, given.max_context)
    report |= {
        "machine": f"{platform.system()}, {os.cpu_count()} cores, {format_size(physical_memory_bytes())}",
        "checkpoint": f"{given.form}, {given.layers} layers" + ", trunk of 2 bits" * given.small_trunk,
        "budget": given.ram_budget,
        "hard limit": "a memory cgroup"
        if stage.is_caged
        else "none: no memory cgroup of version 1, or not root",
    }
    print(", ".join(f"{key}: {value}" for key, value in report.items() if key != "acts"), flush=True)
    sys.exit(0 if play(stage, given.only, path, report) else 1)


if __name__ == "__main__":
    main()
