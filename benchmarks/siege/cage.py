"""A server under a memory cgroup as large as its budget and 256 open files. Linux, as root."""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from server.commands.checkpoint import POCKET

DESCRIPTORS = 256
# After so long a silent engine is ended; less would end one that only waits for a busy machine.
STEP_S = 15
KEYS = {"bystander": "b-1f6c", "attacker": "a-9d20", "miser": "m-77aa"}
ROOT = Path(__file__).parents[2]
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def ask(
    port: int, method: str, path: str, headers: dict[str, str], raw: bytes = b"", timeout_s: float = 60
) -> tuple[int, bytes]:
    """The status and the body of an answer, over a connection of its own. Costs little beside httpx."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as client:
        client.request(method, path, raw or None, headers)
        answer = client.getresponse()
        return answer.status, answer.read()


@dataclass
class Cage:
    """One group of processes; made on entry and removed at the end."""

    budget: int
    path: Path = field(init=False)
    num_wanted_kills: int = 0  # by a round that is about them

    def __post_init__(self) -> None:
        parent = V1 if V1.is_dir() else V2
        self._is_v1 = parent == V1
        self.path = parent / f"glmserve-siege-{os.getpid()}"
        self.path.mkdir()
        if self._is_v1:
            self._write("memory.limit_in_bytes", self.budget)
        else:
            self._write("memory.max", self.budget)
            self._write("memory.swap.max", 0)

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def enter(self) -> None:
        """Put the calling process into the group; runs between fork and exec."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    @property
    def num_oom_kills(self) -> int:
        """Processes of the group that the kernel has killed for memory."""
        text = (self.path / ("memory.oom_control" if self._is_v1 else "memory.events")).read_text()
        found = re.search(r"oom_kill (\d+)", text)
        return int(found[1]) if found else 0

    @property
    def peak_bytes(self) -> int:
        """The most that the group has had, with the kernel's cache of files."""
        name = "memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"
        return int((self.path / name).read_text())

    @property
    def pids(self) -> list[int]:
        """Processes in the group."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def close(self) -> None:
        """End what is left, and remove the group."""
        deadline = time.monotonic() + 10
        while (left := self.pids) and time.monotonic() < deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.path.rmdir()


class Server:
    """glmserve in a cage, on a port that stays the same over its restarts."""

    def __init__(self, cage: Cage, folder: Path) -> None:
        self.cage, self.folder, self.port = cage, folder, 0
        self.log = folder / "log"
        keys = folder / "keys"
        lines = [f"{name}: {key}" for name, key in KEYS.items() if name != "miser"]
        keys.write_text("\n".join([*lines, f"miser: {KEYS['miser']} tokens/day=100"]) + "\n")
        keys.chmod(0o600)
        self.cache = folder / "prefix"
        self._flags = [
            "--model",
            str(POCKET),
            "--api-key-file",
            str(keys),
            "--prefix-cache-dir",
            str(self.cache),
        ]
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        flags = [*self._flags, "--ram-budget", str(self.cage.budget), "--step-timeout", str(STEP_S)]
        with self.log.open("ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "--port", str(self.port), *flags],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, preexec_fn=self.cage.enter,
            )  # fmt: skip
        while not (found := re.search(rb"listening on http://[^:]+:(\d+)", self.log.read_bytes()[start:])):
            assert self.process.poll() is None, f"{self.process.poll()}: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        self.port = int(found[1])
        started_at = time.monotonic()
        self.wait_until_ready(90)
        self.start_s = time.monotonic() - started_at

    def is_ready(self) -> bool:
        """Whether /health says so."""
        try:
            return ask(self.port, "GET", "/health", {}, timeout_s=5)[0] == 200
        except (OSError, HTTPException):
            return False

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether it answered within this time."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    @property
    def engine(self) -> int:
        """The pid of the engine process; 0 where there is none."""
        for pid in self.cage.pids:
            try:
                if b"server.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            except OSError:
                continue
        return 0

    def stop(self) -> None:
        """End it as a service would."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_folder() -> "tempfile.TemporaryDirectory[str]":
    """For the log, the keys and saved prompts."""
    return tempfile.TemporaryDirectory(prefix="glmserve-siege-")
