"""Deaths, stops and shortages below the server, and whether it comes back. Each returns its faults."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import httpx

from benchmarks.siege.bodies import chat
from benchmarks.siege.cage import KEYS, STEP_S, Server

HEADERS = {"authorization": f"Bearer {KEYS['attacker']}"}
# After a fault's end; an engine that starts slowly, on a busy machine, has three times its last start.
BACK_S = 10.0


class Crowd:
    """Six clients that ask all the time. Each answer ends right or in words; anything else is a fault."""

    def __init__(self, url: str) -> None:
        self._url, self._stopping = url, threading.Event()
        self.faults: list[str] = []
        self.num_answers = 0
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
            with suppress(httpx.TransportError):  # the HTTP process itself was killed
                url = f"{self._url}/v1/chat/completions"
                answer = httpx.post(url, json=body, headers=HEADERS, timeout=60)
                self.num_answers += 1
                if answer.status_code == 200 and number % 2:
                    last = answer.text.rstrip().rpartition("\n\n")[2]
                    if last != "data: [DONE]" and '"error"' not in last:
                        self.faults.append(f"a stream ended in {last[-80:]!r}")
                elif answer.status_code == 200:
                    said = answer.json()
                    if "choices" not in said and "error" not in said:
                        self.faults.append(f"an answer holds neither choices nor an error: {str(said)[:80]}")
                elif "error" not in json.loads(answer.text):
                    self.faults.append(f"{answer.status_code} without words")


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


def asked_to_stop(server: Server) -> list[str]:
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
    ("the page cache is squeezed", memory_short),
]
