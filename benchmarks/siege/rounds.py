"""Deaths, stops and shortages below the server, and whether it comes back. Each returns its faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from benchmarks.siege.bodies import CHAT, chat
from benchmarks.siege.cage import KEYS, STEP_S, Server, ask

HEADERS = {"authorization": f"Bearer {KEYS['attacker']}"}
# After a fault's end; an engine that starts slowly, on a busy machine, has three times its last start.
BACK_S = 10.0


class Crowd:
    """Six clients that ask all the time. Each answer ends right or in words; anything else is a fault."""

    def __init__(self, port: int) -> None:
        self._port, self._stopping = port, threading.Event()
        self.faults: list[str] = []
        self.num_answers = self.num_told = 0
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(6)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stopping.wait(0.05):
            body = chat(f"Count from {number}.", stream=bool(number % 2), max_tokens=40)
            with suppress(OSError, HTTPException):  # the HTTP process itself was killed
                status, raw = ask(self._port, "POST", CHAT, HEADERS, json.dumps(body).encode())
                self.num_answers += 1
                self._judge(status, raw.decode(), is_stream=bool(number % 2))

    def _judge(self, status: int, text: str, *, is_stream: bool) -> None:
        if status == 200 and is_stream:
            last = text.rstrip().rpartition("\n\n")[2]
            is_told = '"error"' in last
            if last != "data: [DONE]" and not is_told:
                self.faults.append(f"a stream ended in {last[-80:]!r}")
        else:
            is_told = "error" in json.loads(text)
            if not is_told and (status != 200 or "choices" not in json.loads(text)):
                self.faults.append(f"{status} with neither an answer nor an error: {text[:80]}")
        self.num_told += is_told


def _until_back(server: Server, what: str) -> list[str]:
    seconds = max(BACK_S, 3 * server.start_s)
    return [] if server.wait_until_ready(seconds) else [f"{what}: not ready within {seconds:.0f} s"]


def engine_killed(server: Server) -> list[str]:
    """SIGKILL, as the kernel's OOM killer sends it, amid answers."""
    if pid := server.engine:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    return _until_back(server, "the engine was killed")


def engine_stopped(server: Server) -> list[str]:
    """SIGSTOP: the server has to notice by itself, after --step-timeout."""
    pid = server.engine
    if pid:
        os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + STEP_S + max(BACK_S, 3 * server.start_s)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if server.engine not in (0, pid) and server.is_ready():
            return []
    return ["the engine was stopped, and that was not noticed"]


def http_killed(server: Server) -> list[str]:
    """SIGKILL to the HTTP process: the engine must not stay behind."""
    engine = server.engine
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 5
    while engine in server.cage.pids and time.monotonic() < deadline:
        time.sleep(0.05)
    faults = ["the engine outlived the HTTP process"] if engine in server.cage.pids else []
    server.start()
    return faults


def asked_to_stop(server: Server, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
    """SIGTERM amid answers, as a service sends it."""
    server.process.terminate()
    faults = []
    try:
        code = server.process.wait(20)
        faults = [] if code == 0 else [f"exit code {code} after SIGTERM"]
    except subprocess.TimeoutExpired:
        faults = ["no end 20 s after SIGTERM"]
        server.process.kill()
        server.process.wait()
    meanwhile()
    server.start()
    return faults


def disk_gone(server: Server) -> list[str]:
    """The folder of saved prompts is emptied, and a file stands in its place, then it is back."""
    shutil.rmtree(server.cache, ignore_errors=True)
    with suppress(OSError):
        server.cache.write_text("in the way")
    time.sleep(1.0)
    with suppress(OSError):
        server.cache.unlink()
        server.cache.mkdir()
    return _until_back(server, "the disk was gone")


def memory_short(server: Server) -> list[str]:
    """Other files push on the cage's page cache: 400 MB are read in it."""
    code = "import os\nwith open('/tmp/glmserve-siege-%d'%os.getpid(),'wb+') as f:\n"
    code += " os.unlink(f.name)\n for _ in range(400): f.write(bytes(2**20))\n f.flush(); f.seek(0)\n"
    code += " while f.read(2**20): pass\n"
    subprocess.run(["python3", "-c", code], preexec_fn=server.cage.enter, check=False, timeout=60)
    return _until_back(server, "memory was short")


HOG = """
import time
held = []
while True:
    held.append(bytearray(b"x") * 2**22)
    time.sleep(0.004)
"""


def memory_gone(server: Server) -> list[str]:
    """The kernel's OOM killer ends the engine: another process of the group takes all that there is."""
    kills, engine = server.cage.num_oom_kills, server.engine
    # A real model is the largest of the group by far; Pocket is not, so the kernel is told to begin with it.
    Path(f"/proc/{engine}/oom_score_adj").write_text("1000")
    hog = subprocess.Popen([sys.executable, "-c", HOG], preexec_fn=server.cage.enter)
    deadline = time.monotonic() + 30
    while server.cage.num_oom_kills == kills and time.monotonic() < deadline:
        time.sleep(0.01)
    hog.kill()
    hog.wait()
    time.sleep(0.3)
    faults = _until_back(server, "the engine was killed for memory")
    num_kills = server.cage.num_oom_kills - kills
    server.cage.num_wanted_kills += num_kills
    if server.process.poll() is not None:
        return ["the HTTP process was killed for memory"]
    return faults + ([] if num_kills and server.engine != engine else ["the engine was not killed"])


@contextmanager
def _small_disk(server: Server) -> Iterator[None]:
    """A real filesystem of 8 MB where the server saves prompts, over a restart at either end."""
    image = server.folder / "disk"
    with open(image, "wb") as file:
        file.truncate(8 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    asked_to_stop(server, lambda: subprocess.run(["mount", "-o", "loop", image, server.cache], check=True))
    try:
        yield
    finally:
        asked_to_stop(server, lambda: subprocess.run(["umount", server.cache], check=True))


def disk_full(server: Server) -> list[str]:
    """The filesystem of saved prompts is filled to the last byte amid answers, and so it is at a start."""
    faults = []
    with _small_disk(server):
        with suppress(OSError), open(server.cache / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        start = server.log.stat().st_size
        for is_restarted in (False, True):
            if is_restarted:
                faults += asked_to_stop(server)
            for number in range(3):
                body = chat(f"{number} {is_restarted} " + "a word " * 600)
                status, raw = ask(server.port, "POST", CHAT, HEADERS, json.dumps(body).encode())
                faults += [] if status == 200 else [f"a full disk: {status} {raw[:80]!r}"]
        if b"No space left" not in server.log.read_bytes()[start:]:
            faults.append("no write failed: the round shows nothing")
    return faults


def descriptors_short(server: Server) -> list[str]:
    """300 connections stay open while the engine is killed: it is started again all the same."""
    import socket

    held = []
    for _ in range(300):
        with suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", server.port), timeout=2))
    faults = engine_killed(server)
    for client in held:
        client.close()
    return faults


ROUNDS: list[tuple[str, Callable[[Server], list[str]]]] = [
    ("the engine is killed", engine_killed),
    ("the engine is stopped", engine_stopped),
    ("the engine is killed, no descriptors", descriptors_short),
    ("the HTTP process is killed", http_killed),
    ("SIGTERM amid answers", asked_to_stop),
    ("the prefix cache's folder is gone", disk_gone),
    ("the disk is full (ENOSPC)", disk_full),
    ("the page cache is squeezed", memory_short),
    ("the engine is killed for memory (OOM)", memory_gone),
]
