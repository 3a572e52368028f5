"""Random schedules of failing system calls over running servers with eight clients, and over fresh starts.

    python -m benchmarks.syscalls.schedules --schedules 500 --starts 50 --jobs 4 --output rows.json

Each request must end with the answer that it has without faults, or with an error in words, and a request
must be answered rightly within ten seconds of a schedule's end. Prints the schedules of which that is not
true. Each job has a server of its own, over which its schedules run one after the other.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.syscalls.faults import KINDS, Control, Schedule, build_shim
from benchmarks.syscalls.served import NUM_CLIENTS, PAUSE_S, QUESTIONS, Server, serving

START_S = 120.0


@dataclass(frozen=True)
class Row:
    """What became of one schedule."""

    round: str
    seed: int
    kinds: list[str]
    per_mille: int
    seconds: float
    num_failed_calls: int
    outcomes: dict[str, int]
    recovery_s: float | None
    faults: list[str]
    log: list[str] = field(default_factory=list)  # of a server that did wrong

    @classmethod
    def of(
        cls,
        name: str,
        one: Schedule,
        num_failed: int,
        told: Sequence[str],
        recovery_s: float | None,
        server: Server,
    ) -> "Row":
        """The row of a schedule under which requests ended as told."""
        wrong = sorted({outcome for outcome in told if outcome.startswith("WRONG")})
        faults = wrong + (["not served again in time"] if recovery_s is None else [])
        outcomes = Counter(outcome.partition(":")[0] for outcome in told)
        return cls(name, one.seed, [KINDS[kind] for kind in one.kinds], one.per_mille, round(one.seconds, 2),
                   num_failed, dict(outcomes), recovery_s, faults, server.ending if faults else [],
                   )  # fmt: skip


def run_schedules(library: Path, folder: Path, seeds: Sequence[int]) -> Iterator[Row]:
    """Over one running server, one schedule after the other; over another one where the process has ended."""
    control, left = Control(folder / "control"), deque(seeds)
    while left:
        with (
            serving(library, folder, folder / "control") as server,
            ThreadPoolExecutor(NUM_CLIENTS) as clients,
        ):
            assert server.is_served(START_S), server.ending
            for question in QUESTIONS:
                server.ask(question)
            while left and server.process.poll() is None:
                yield _run_schedule(server, clients, control, Schedule.of(left.popleft()))


def _run_schedule(server: Server, clients: ThreadPoolExecutor, control: Control, one: Schedule) -> Row:
    control.begin(one)
    until = time.monotonic() + one.seconds
    right_at: list[float] = []
    work = partial(_ask_until, server, until, one.seed, right_at)
    running = [clients.submit(work, client) for client in range(NUM_CLIENTS)]
    time.sleep(max(0.0, until - time.monotonic()))
    num_failed, ended = control.end(), time.monotonic()
    outcomes = [outcome for client in running for outcome in client.result()]
    return Row.of("running", one, num_failed, outcomes, server.recovers(ended, right_at), server)


def _ask_until(server: Server, until: float, seed: int, right_at: list[float], client: int) -> list[str]:
    """One client's requests: as many as begin before a schedule's end."""
    outcomes: list[str] = []
    while not outcomes or time.monotonic() < until:
        question = QUESTIONS[(client + len(outcomes)) % NUM_CLIENTS]
        outcomes.append(server.ask(question, bool((client + seed) % 2)))
        if outcomes[-1] == "right":
            right_at.append(time.monotonic())
        else:
            time.sleep(PAUSE_S)
    return outcomes


def run_starts(library: Path, folder: Path, seeds: Sequence[int]) -> Iterator[Row]:
    """Over servers that start, each under its own schedule. A start that is given up ends in one line."""
    control = Control(folder / "control")
    with serving(library, folder, folder / "control") as server:
        assert server.is_served(START_S), server.ending
        expected = server.expected
    for seed in seeds:
        one = Schedule.of(seed)
        control.begin(one)
        with serving(library, folder, folder / "control") as server:
            server.expected = expected
            time.sleep(2 * one.seconds)
            outcomes = [server.ask(QUESTIONS[0])] if server.port else []
            num_failed, is_over = control.end(), server.process.poll() is not None
            if is_over:
                lines = server.ending
                is_said = bool(lines) and lines[-1].startswith("glmserve: ") and "Traceback" not in str(lines)
                outcomes = ["ended in words" if is_said else f"WRONG: {' / '.join(lines[-3:])}"]
            recovery_s = 0.0 if is_over else server.recovers(time.monotonic(), ())
            yield Row.of("starts", one, num_failed, outcomes, recovery_s, server)


Run = Callable[[Path, Path, Sequence[int]], Iterator[Row]]
ROUNDS: dict[str, Run] = {"running": run_schedules, "starts": run_starts}


class Rows(Protocol):
    """A queue of rows from the jobs; None where one has ended."""

    def put(self, row: Row | None) -> None:
        """Add a row."""

    def get(self) -> Row | None:
        """The next row."""


def _work(name: str, library: Path, seeds: Sequence[int], rows: Rows) -> None:
    """One job, in a process of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the ends of all servers
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in ROUNDS[name](library, Path(folder), seeds):
                rows.put(row)
        finally:
            rows.put(None)


def run_jobs(name: str, library: Path, seeds: Sequence[int], num_jobs: int) -> Iterator[Row]:
    """The rows of all seeds, which the jobs have by turns."""
    context = multiprocessing.get_context("spawn")
    rows: Rows = context.SimpleQueue()
    num_running = min(num_jobs, len(seeds))
    for job in range(num_running):
        context.Process(
            target=_work, args=(name, library, seeds[job::num_running], rows), daemon=True
        ).start()
    while num_running:
        if (row := rows.get()) is None:
            num_running -= 1
        else:
            yield row


class Table:
    """All rows, with those of earlier runs where a file has them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path is not None and path.exists() else []
        self._rows: dict[tuple[str, int], dict[str, Any]] = {
            (row["round"], row["seed"]): row for row in found
        }

    def add(self, row: Row) -> None:
        """Keep a row, in the file too: a run that is broken off has what it has done."""
        self._rows[row.round, row.seed] = asdict(row)
        if row.faults:
            print(f"{Schedule.of(row.seed)}: {'; '.join(row.faults)}", flush=True)
        if self._path is not None:
            part = self._path.with_name(self._path.name + ".part")
            part.write_text(json.dumps(list(self._rows.values()), indent=1))
            os.replace(part, self._path)

    def summary(self, name: str) -> list[str]:
        """A round in two lines: what the requests were told, and how soon they were served again."""
        rows = [row for (round_name, _), row in self._rows.items() if round_name == name]
        outcomes = sum((Counter(row["outcomes"]) for row in rows), Counter[str]())
        told = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
        num_failed = sum(row["num_failed_calls"] for row in rows)
        recoveries_s = sorted(row["recovery_s"] for row in rows if row["recovery_s"] is not None) or [0.0]
        num_wrong = sum(bool(row["faults"]) for row in rows)
        return [
            f"{name}: {len(rows)} schedules, {num_failed} calls interfered with; {told};",
            f"served again after {recoveries_s[len(recoveries_s) // 2]:.1f} s in the median, "
            f"{recoveries_s[-1]:.1f} s at most; {num_wrong} schedules wrong",
        ]


def main() -> int:
    """Runs both rounds; 1 where a schedule went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=500)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="servers at once, each with eight clients")
    parser.add_argument("--shim", type=Path, help="the compiled shim; compiled to this path where it is not")
    parser.add_argument("--output", type=Path, help="JSON, a row a schedule, added to those that it has")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    table, is_wrong = Table(given.output), False
    with tempfile.TemporaryDirectory() as folder:
        wanted = given.shim or Path(folder) / "shim.so"
        library = wanted if wanted.exists() else build_shim(wanted)
        if library is None:
            print("there is no C compiler here, or this is not Linux: nothing was run")
            return 0
        for name, count in (("running", given.schedules), ("starts", given.starts)):
            seeds = range(given.first_seed, given.first_seed + count)
            num_rows = 0
            for row in run_jobs(name, library.absolute(), seeds, given.jobs):
                table.add(row)
                num_rows, is_wrong = num_rows + 1, is_wrong or bool(row.faults)
            if num_rows < count:
                is_wrong = True
                print(f"{name}: {count - num_rows} schedules were not run: a job broke off", flush=True)
            if count:
                print("\n".join(table.summary(name)), flush=True)
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
