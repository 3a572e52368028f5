"""Random schedules of failing system calls over a running server with eight clients, and over fresh starts.

    python -m benchmarks.syscalls.schedules --schedules 500 --starts 50

Each request must end with the answer that it has without faults, or with an error in words, and a request
must be answered rightly within ten seconds of a schedule's end. Prints the schedules of which that is not
true.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from server.commands.checkpoint import POCKET

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KINDS = ("EIO on reads", "short reads", "slow reads", "EIO on writes", "ENOSPC", "EMFILE", "ENOMEM")
CONTROL = struct.Struct("<IIIIQQ7Q")
NUM_CLIENTS = 8
RECOVERY_S = 10.0
# A request that has no end after so long hangs.
PATIENCE_S = 60.0
BUDGET = "766M"  # the least: most experts come from the disk
QUESTIONS = [f"What is {17 + number}+{25 + 3 * number}?" for number in range(NUM_CLIENTS)]


def build_shim(folder: Path) -> Path | None:
    """The shared library; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "shim.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


@dataclass(frozen=True)
class Schedule:
    """Which calls fail, how often, and for how long."""

    seed: int
    kinds: tuple[int, ...]
    per_mille: int
    slow_us: int
    seconds: float

    @classmethod
    def of(cls, seed: int) -> "Schedule":
        """The schedule of a seed."""
        rng = random.Random(seed)
        kinds = tuple(sorted(rng.sample(range(len(KINDS)), rng.choice([1, 1, 2, 3]))))
        return cls(seed, kinds, rng.choice([2, 10, 50, 200, 1000]), rng.choice([1000, 20_000, 200_000]),
                   rng.uniform(0.3, 1.5))  # fmt: skip

    def __str__(self) -> str:
        names = " + ".join(KINDS[kind] for kind in self.kinds)
        return f"seed {self.seed}: {names}, {self.per_mille} of 1000 calls, {self.seconds:.1f} s"


class Control:
    """The memory through which schedules reach the shim in both processes."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(CONTROL.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), CONTROL.size)

    def begin(self, one: Schedule) -> None:
        """Let calls fail from now on."""
        mask = sum(1 << kind for kind in one.kinds)
        self._memory[:] = CONTROL.pack(0, mask, one.per_mille, one.slow_us, one.seed, *[0] * 8)
        self._memory[:4] = struct.pack("<I", 1)

    def end(self) -> int:
        """Let no call fail any more; how many did."""
        self._memory[:4] = bytes(4)
        return sum(CONTROL.unpack(self._memory[:])[6:])


@dataclass
class Server:
    """A server with the shim in it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    expected: dict[str, str] = field(default_factory=dict)

    def ask(self, question: str, is_streaming: bool = False) -> str:
        """What became of a request: right, or the kind of its error; anything else begins with WRONG."""
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 4}
        try:
            url = f"{self.url}/v1/chat/completions"
            answer = httpx.post(url, json=body | {"stream": is_streaming}, timeout=PATIENCE_S)
        except httpx.ConnectError as error:
            return f"WRONG: {error!r}" if self.process.poll() is None else "the process has ended"
        except httpx.HTTPError as error:
            return f"WRONG: no end: {error!r}"
        return self._judge(question, answer, is_streaming)

    def _judge(self, question: str, answer: httpx.Response, is_streaming: bool) -> str:
        if is_streaming and answer.status_code == 200:
            content, told = _read_stream(answer.text)
        else:
            fields: dict[str, Any] = answer.json()
            told = fields.get("error", {}).get("message", "")
            content = "" if told else _said(fields["choices"][0]["message"])
        if told:
            return f"{answer.status_code} in words" if len(told) > 10 else f"WRONG: {answer.text[:200]}"
        expected = self.expected.setdefault(question, content)
        return "right" if content == expected else f"WRONG: {content[:80]!r} is not {expected[:80]!r}"

    def recovers(self, since_s: float, right_at: Sequence[float]) -> float | None:
        """Seconds from `since_s` to a right answer, maybe one of those at `right_at`; None if it is late."""
        while not (after := [at for at in right_at if at > since_s]):
            if time.monotonic() > since_s + RECOVERY_S:
                return None
            if self.ask(QUESTIONS[0]) == "right":
                right_at = [time.monotonic()]
            time.sleep(0.2)
        seconds = min(after) - since_s
        return seconds if seconds <= RECOVERY_S else None


def _said(message: dict[str, Any]) -> str:
    return (message.get("reasoning") or "") + "|" + (message.get("content") or "")


def _read_stream(text: str) -> tuple[str, str]:
    """What was said in a stream's chunks, and the error that ended it."""
    thought, content, told, is_over = "", "", "", False
    for line in text.splitlines():
        if line == "data: [DONE]":
            is_over = True
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            told = told or chunk.get("error", {}).get("message", "")
            for choice in chunk.get("choices", []):
                thought += choice["delta"].get("reasoning") or ""
                content += choice["delta"].get("content") or ""
    return f"{thought}|{content}", told or ("" if is_over else "x")


@contextmanager
def serving(library: Path, folder: Path, control: Path, is_awaited: bool = True) -> Iterator[Server]:
    """A streaming server over Pocket with the smallest budget, its cache in `folder`."""
    cache = folder / "cache"
    model = folder / "pocket"
    if not model.exists():  # the original lies among modules that Python imports
        shutil.copytree(POCKET, model)
    under = f"{model}:{cache}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("GLMSERVE_")}
    env |= {"LD_PRELOAD": str(library), "SYSCALL_SHIM": str(control), "SYSCALL_SHIM_UNDER": under}
    flags = ["--port", "0", "--stream-experts", "--ram-budget", BUDGET, "--prefix-cache-dir", str(cache)]
    flags += ["--model", str(model), "--prefix-cache-size", "50M", "--step-timeout", "20"]
    log = folder / "log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "server.cli", *flags], cwd=ROOT, env=env, stderr=stderr
        )
    try:
        yield Server(process, _url_of(process, log) if is_awaited else "", log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url_of(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens; "" where it ended before it did."""
    while True:
        text = log.read_text(errors="replace")
        if "listening on " in text and "\n" in text.split("listening on ")[1]:
            return text.split("listening on ")[1].split()[0]
        if process.poll() is not None:
            return ""
        time.sleep(0.05)


@dataclass
class Findings:
    """What became of all requests, and which schedules went wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    num_failed_calls: int = 0

    def note(self, one: Schedule, outcomes: Sequence[str], recovery_s: float | None) -> None:
        """The outcome of one schedule."""
        self.outcomes.update(outcome.partition(":")[0] for outcome in outcomes)
        wrong = [outcome for outcome in outcomes if outcome.startswith("WRONG")]
        if recovery_s is None:
            wrong.append("not served again in time")
        else:
            self.recoveries_s.append(recovery_s)
        if wrong:
            self.faults.append(f"{one}: {'; '.join(sorted(set(wrong)))}")
            print(self.faults[-1], flush=True)

    def print_summary(self, name: str, count: int) -> None:
        """One line for the table."""
        worst = max(self.recoveries_s, default=0.0)
        told = ", ".join(f"{number} {outcome}" for outcome, number in self.outcomes.most_common())
        print(f"{name}: {count} schedules, {self.num_failed_calls} calls interfered with; {told};")
        print(f"served again after {worst:.1f} s at most; {len(self.faults)} schedules wrong", flush=True)


def run_schedules(library: Path, folder: Path, seeds: Sequence[int]) -> Findings:
    """Over one running server, one schedule after the other."""
    found, path = Findings(), folder / "control"
    control = Control(path)
    with serving(library, folder, path) as server, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        assert _is_served(server, 120), server.log.read_text(errors="replace")
        for question in QUESTIONS:
            server.ask(question)
        for number, seed in enumerate(seeds):
            one = Schedule.of(seed)
            control.begin(one)
            until = time.monotonic() + one.seconds

            right_at: list[float] = []
            work = partial(_ask_until, server, until, number, right_at)
            running = [clients.submit(work, client) for client in range(NUM_CLIENTS)]
            time.sleep(max(0.0, until - time.monotonic()))
            found.num_failed_calls += control.end()
            ended = time.monotonic()
            outcomes = [outcome for client in running for outcome in client.result()]
            found.note(one, outcomes, server.recovers(ended, right_at))
    return found


def _ask_until(server: Server, until: float, number: int, right_at: list[float], client: int) -> list[str]:
    """One client's requests: as many as begin before a schedule's end."""
    outcomes: list[str] = []
    while not outcomes or time.monotonic() < until:
        question = QUESTIONS[(client + len(outcomes)) % NUM_CLIENTS]
        outcomes.append(server.ask(question, bool((client + number) % 2)))
        if outcomes[-1] == "right":
            right_at.append(time.monotonic())
        else:
            time.sleep(0.05)
    return outcomes


def run_starts(library: Path, folder: Path, seeds: Sequence[int]) -> Findings:
    """Over servers that start, each under its own schedule. A start that is given up ends in one line."""
    found, path = Findings(), folder / "control"
    control = Control(path)
    with serving(library, folder, path) as server:
        assert _is_served(server, 120), server.log.read_text(errors="replace")
        expected = server.expected
    for seed in seeds:
        one = Schedule.of(seed)
        control.begin(one)
        with serving(library, folder, path) as server:
            server.expected = expected
            time.sleep(2 * one.seconds)
            outcomes = [server.ask(QUESTIONS[0])] if server.url else []
            found.num_failed_calls += control.end()
            if server.process.poll() is not None:
                lines = server.log.read_text(errors="replace").splitlines()
                is_said = bool(lines) and lines[-1].startswith("glmserve: ") and "Traceback" not in str(lines)
                outcomes = ["ended in words" if is_said else f"WRONG: {' / '.join(lines[-3:])}"]
            is_over = server.process.poll() is not None
            recovery_s = 0.0 if is_over else server.recovers(time.monotonic(), ())
            found.note(one, outcomes, recovery_s)
    return found


def _is_served(server: Server, most_s: float) -> bool:
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        if server.ask(QUESTIONS[0]) == "right":
            return True
        time.sleep(0.3)
    return False


def main() -> int:
    """Runs both rounds; 1 where a schedule went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=500)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build_shim(folder)
        if library is None:
            print("there is no C compiler here, or this is not Linux: nothing was run")
            return 0
        first, num_wrong = given.first_seed, 0
        for title, run, count in (
            ("running", run_schedules, given.schedules),
            ("starts", run_starts, given.starts),
        ):
            if count:
                found = run(library, folder, range(first, first + count))
                found.print_summary(title, count)
                num_wrong += len(found.faults)
                shutil.copy(folder / "log", Path(tempfile.gettempdir()) / f"glmserve-syscalls-{title}.log")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
