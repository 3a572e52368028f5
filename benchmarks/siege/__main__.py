"""Runs the siege and prints what came of it; exits with 1 where a bound was broken.

`--quick` takes about two minutes, all of it at most ten; `--only WORDS` runs attacks whose name has them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.siege.attacks import attacks
from benchmarks.siege.bystander import Bystander, Seen
from benchmarks.siege.cage import ROOT, Cage, Server, make_folder
from benchmarks.siege.rounds import ROUNDS, Crowd

MIB = 2**20
# What the bystander is promised: beside any attack, and beside all of them together for /health.
SLOWER_FIRST, SLOWER_JSON, HEALTH_S = 1.5, 3.0, 0.1
# Below so many samples a median says nothing.
MIN_SAMPLES = 3


@dataclass
class Row:
    """One line of the table."""

    name: str
    tried: str
    seen: Seen
    faults: list[str]
    told: str = ""


class Siege:
    """One server and its bystander, through all attacks."""

    def __init__(self, server: Server, bystander: Bystander) -> None:
        self._server, self._bystander = server, bystander
        self._calm = Seen()
        self._num_oom_kills = 0
        self.rows: list[Row] = []
        self.health_s: list[float] = []

    def measure_calm(self, seconds: float) -> None:
        """What the bystander sees alone."""
        self._bystander.turn()
        time.sleep(seconds)
        self._calm = self._bystander.turn()
        self._add(Row("(nothing)", "", self._calm, [f"wrong: {one}" for one in self._calm.wrong]))

    def attack(self, name: str, seconds: float) -> None:
        """One attack, from a process of its own."""
        pid = self._server.process.pid
        command = [sys.executable, "-m", "benchmarks.siege.attacks", name, self._server.url, str(seconds)]
        self._bystander.turn()
        try:
            result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds + 30)
            said = json.loads(result.stdout or "{}") or {
                "tried": 0,
                "answers": {"FAILED": result.stderr[-300:]},
            }
        except subprocess.TimeoutExpired:
            said = {"tried": 0, "answers": {"no end": 1}}
        seen = self._bystander.turn()
        faults = [one for one in said["answers"] if one.startswith(("BYPASS", "FAILED"))]
        if self._server.process.poll() is not None or self._server.process.pid != pid:
            faults.append("the HTTP process died")
            self._server.start()
        if not self._server.wait_until_ready(10):
            faults.append("not ready 10 s later")
        faults += self._judge(seen) + [f"failed: {one}" for one in seen.failed[:2]]
        self.health_s += seen.health_s
        told = ", ".join(f"{answer}: {count}" for answer, count in sorted(said["answers"].items()))
        self._add(Row(name, str(said["tried"]), seen, faults, told))

    def round(self, name: str, number: int) -> None:
        """So many times one of `ROUNDS`, amid answers to others."""
        act = dict(ROUNDS)[name]
        self._bystander.turn()
        faults: list[str] = []
        with Crowd(self._server.port) as crowd:
            for _ in range(number):
                time.sleep(0.5)
                faults += act(self._server)
        seen = self._bystander.turn()
        faults += crowd.faults[:3] + [f"wrong: {one}" for one in seen.wrong]
        told = f"{crowd.num_answers} answers beside it, {crowd.num_told} of them errors in words"
        self._add(Row(name, str(number), seen, faults, told))

    def _judge(self, seen: Seen) -> list[str]:
        faults = [f"wrong: {one}" for one in seen.wrong]
        if len(seen.first_s) < MIN_SAMPLES:
            faults.append(f"the bystander had {len(seen.first_s)} answers")
        elif (ratio := seen.median_first_s / self._calm.median_first_s) > SLOWER_FIRST:
            faults.append(f"first token {ratio:.1f}x")
        if len(seen.json_s) >= MIN_SAMPLES:
            ratio = seen.median_json_s / self._calm.median_json_s
            faults += [f"JSON {ratio:.1f}x"] if ratio > SLOWER_JSON else []
        return faults

    def _add(self, row: Row) -> None:
        kills = self._server.cage.num_oom_kills - self._server.cage.num_wanted_kills
        if kills > self._num_oom_kills:
            row.faults.append(f"{kills - self._num_oom_kills} OOM kills")
            self._num_oom_kills = kills
        self.rows.append(row)
        outcome = "; ".join(row.faults) or "survived"
        first, worst = 1000 * row.seen.median_first_s, 1000 * row.seen.worst_first_s
        figures = f"first token {first:.0f} ms, worst {worst:.0f}, JSON {1000 * row.seen.median_json_s:.0f}"
        health = f"health p99 {1000 * row.seen.health_p99_s:.0f}"
        print(f"{row.name}: {row.tried} tried; {row.told}; {figures}, {health}; {outcome}", flush=True)

    def close(self) -> list[str]:
        """Faults of the whole: /health over all attacks."""
        times = Seen(health_s=self.health_s)
        if self.health_s and times.health_p99_s > HEALTH_S:
            return [f"/health took {1000 * times.health_p99_s:.0f} ms at the 99th percentile"]
        return []

    def table(self) -> Table:
        """What came of it."""
        table = Table(title="A bystander beside each attack (ms)")
        for name in ("attack", "tried", "survived", "first token", "worst", "JSON", "health p99"):
            table.add_column(name, justify="left" if name in ("attack", "survived") else "right")
        for row in self.rows:
            seen = row.seen
            figures = (seen.median_first_s, seen.worst_first_s, seen.median_json_s, seen.health_p99_s)
            table.add_row(
                row.name,
                row.tried,
                "; ".join(row.faults) or "yes",
                *(f"{1000 * one:.0f}" if one < 1e6 else "-" for one in figures),
            )
        return table


def main() -> int:
    """Runs all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siege", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")
    parser.add_argument("--budget", type=int, default=850, help="megabytes of the budget and of the cgroup")
    parser.add_argument("--only", default="", help="parts of the names of attacks and rounds, with commas")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # through the ends of all processes
    seconds, number = (2.5, 1) if options.quick else (5.0, 2)
    cage = Cage(options.budget * 10**6)
    with make_folder() as folder:
        server = Server(cage, Path(folder))
        bystander = Bystander(server.url)
        siege = Siege(server, bystander)
        try:
            siege.measure_calm(4 * seconds)
            for name, _ in attacks():
                if any(part in name for part in options.only.split(",")):
                    siege.attack(name, seconds)
            for name, _ in ROUNDS:
                if any(part in name for part in options.only.split(",")):
                    siege.round(name, number)
        finally:
            bystander.stop()
            server.stop()
            peak, left = cage.peak_bytes, [pid for pid in cage.pids]
            cage.close()
            if options.only:
                print("".join(line for line in server.log.open() if " INFO gen-" not in line)[-6000:])
    faults = siege.close() + ([f"{len(left)} processes stayed behind"] if left else [])
    console = Console(width=150)
    print("load average: " + " ".join(f"{one:.1f}" for one in os.getloadavg()))
    console.print(siege.table())
    print(f"peak of the cgroup, page cache included: {peak / 1e6:.0f} of {options.budget} MB")
    print("\n".join(faults))
    return 1 if faults or any(row.faults for row in siege.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
