"""Where the rehearsal plays: one server in a cage of its budget, asked over HTTP, watched while it works."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.ceiling import CGROUPS, Peak, charged, limited
from config.sizes import parse_size

GLMSERVE = [sys.executable, "-u", "-m", "server.cli"]
READY_S, ANSWER_S, END_S, SAMPLE_S = 600, 3600, 120, 0.05
STEP_TIMEOUT_S = 3600  # two cores take minutes for a layer of a long prompt


def glmserve(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the product to its end."""
    return subprocess.run([*GLMSERVE, *words], capture_output=True, text=True, timeout=600)


@dataclass
class Stage:
    """A folder with the checkpoint, and at most one server."""

    folder: Path
    budget: str
    context: int
    process: subprocess.Popen[str] | None = None
    http: httpx.Client = field(default_factory=httpx.Client)
    group: Path | None = None
    peak: Peak = field(default_factory=Peak)
    ready_s: float = 0.0
    _stack: ExitStack = field(default_factory=ExitStack)
    _sampler: threading.Thread | None = None

    @property
    def flags(self) -> list[str]:
        """Of every command: the model and the budget."""
        return ["--model", str(self.folder), "--stream-experts", "--ram-budget", self.budget,
                "--max-context", str(self.context)]  # fmt: skip

    @property
    def prefixes(self) -> Path:
        """Where the server keeps what it read."""
        return self.folder.parent / f"{self.folder.name}-prefixes"

    @property
    def is_caged(self) -> bool:
        """Whether a memory cgroup of version 1 can be made here."""
        return (CGROUPS / "memory.limit_in_bytes").exists() and os.geteuid() == 0

    def open(self) -> None:
        """Starts the server, if none runs, and waits until it answers."""
        if self.process is not None:
            return
        command = [*GLMSERVE, "serve", *self.flags, "--port", "0", "--prefix-cache-dir", str(self.prefixes),
                   "--step-timeout", str(STEP_TIMEOUT_S)]  # fmt: skip
        if self.is_caged and self.group is None:
            self.group = self._stack.enter_context(limited(parse_size(self.budget)))
        if self.group:
            command = ["sh", "-c", f'echo $$ > {self.group}/cgroup.procs; exec "$@"', "sh", *command]
        started = time.monotonic()
        path = self.folder.parent / f"{self.folder.name}.log"
        with path.open("a", encoding="utf-8") as log:
            at = log.tell()
            self.process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, text=True)
        url = self._address(path, at, started)
        self.http = httpx.Client(base_url=url, timeout=ANSWER_S)
        if self._sampler is None:
            self._sampler = threading.Thread(target=self._watch, daemon=True)
            self._sampler.start()
        while not self._is_ready():
            self._check_alive(started)
            time.sleep(0.1)
        self.ready_s = time.monotonic() - started

    def close(self, number: int = signal.SIGTERM) -> int:
        """Ends the server by a signal; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(END_S)
        self.process = None
        self.http.close()
        return code

    def leave(self) -> None:
        """Ends what is left and removes the cage."""
        if self.process is not None:
            self.close()
        self.group = None
        self._stack.close()

    def processes(self) -> list[int]:
        """The server's and those that it started."""
        found, left = [], [self.process.pid] if self.process else []
        while left:
            found.append(pid := left.pop())
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    left += map(int, path.read_text().split())
        return found

    def metrics(self) -> dict[str, float]:
        """By name and labels as they stand in /metrics, without the product's name before them."""
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("glmserve_"): float(value) for name, value in pairs}

    def ledger(self, kind: str) -> dict[str, float]:
        """The plan's lines, `planned` or most `used`, in bytes."""
        found = (
            (re.fullmatch(rf'memory_{kind}_bytes{{line="(.+)"}}', k), v) for k, v in self.metrics().items()
        )
        return {match[1]: value for match, value in found if match}

    def kernel(self) -> dict[str, int]:
        """What the kernel says of the cage: the most ever charged, times at the limit, kills."""
        if self.group is None:
            return {}
        read = {
            name: int((self.group / f"memory.{name}").read_text())
            for name in ("max_usage_in_bytes", "failcnt")
        }
        kills = re.search(r"oom_kill (\d+)", (self.group / "memory.oom_control").read_text())
        return {**read, "oom_kills": int(kills[1]) if kills else 0, "rss": charged(self.group)["rss"]}

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, whole; SystemExit with the server's words where it is none."""
        answer = self.http.post(f"/v1/{path}", json={"model": "z-ai/glm-5.2", **body})
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:500]}")
        said: dict[str, Any] = answer.json()
        return said

    def events(self, path: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Seconds since the question and the event, for each of a streamed answer."""
        began = time.monotonic()
        asked = {"model": "z-ai/glm-5.2", "stream": True, "stream_options": {"include_usage": True}, **body}
        with self.http.stream("POST", f"/v1/{path}", json=asked) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield time.monotonic() - began, json.loads(line.removeprefix("data: "))

    def _address(self, log: Path, at: int, started: float) -> str:
        while True:
            with log.open(encoding="utf-8") as file:
                file.seek(at)
                if found := re.search(r"listening on (\S+)", file.read()):
                    return found[1]
            self._check_alive(started)
            time.sleep(0.1)

    def _check_alive(self, started: float) -> None:
        assert self.process is not None
        if self.process.poll() is not None or time.monotonic() - started > READY_S:
            self.process.kill()
            self.process = None
            raise RuntimeError(f"the server is not ready; see {self.folder}.log")

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return False

    def _watch(self) -> None:
        """Notes the largest sum of resident memory, and of what process it was."""
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            held: dict[str, int] = {}
            for number, pid in enumerate(self.processes()):
                with suppress(OSError, IndexError):
                    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                    held["engine" if number else "http"] = (
                        held.get("engine" if number else "http", 0) + resident
                    )
            if sum(held.values()) > self.peak.tree_bytes:
                self.peak.tree_bytes, self.peak.rss_at_peak = sum(held.values()), held
            time.sleep(SAMPLE_S)
