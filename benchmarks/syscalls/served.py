"""A server with the shim in both its processes, and what becomes of the requests that it is sent."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from benchmarks.siege.cage import ROOT, ask
from server.commands.checkpoint import POCKET

NUM_CLIENTS = 8
RECOVERY_S = 10.0
# A request that has no end after so long hangs.
PATIENCE_S = 60.0
BUDGET = "766M"  # the least: most experts come from the disk
QUESTIONS = [f"What is {17 + number}+{25 + 3 * number}?" for number in range(NUM_CLIENTS)]
# Between two questions of a client that was told of a fault, and of one that waits for the fault's end.
PAUSE_S = 0.05


@dataclass
class Server:
    """A server with the shim in it."""

    process: subprocess.Popen[bytes]
    port: int  # 0 where it ended before it listened
    log: Path
    expected: dict[str, str] = field(default_factory=dict)

    def ask(self, question: str, is_streaming: bool = False) -> str:
        """What became of a request: right, or the kind of its error; anything else begins with WRONG."""
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 4}
        raw = json.dumps(body | {"stream": is_streaming}).encode()
        headers = {"content-type": "application/json"}
        try:
            status, said = ask(self.port, "POST", "/v1/chat/completions", headers, raw, PATIENCE_S)
        except ConnectionRefusedError as error:
            return f"WRONG: {error!r}" if self.process.poll() is None else "the process has ended"
        except (OSError, HTTPException) as error:
            return f"WRONG: no end: {error!r}"
        return self._judge(question, status, said.decode(), is_streaming)

    def _judge(self, question: str, status: int, text: str, is_streaming: bool) -> str:
        if is_streaming and status == 200:
            content, told = _read_stream(text)
        else:
            fields: dict[str, Any] = json.loads(text)
            told = fields.get("error", {}).get("message", "")
            content = "" if told else _said(fields["choices"][0]["message"])
        if told:
            return f"{status} in words" if len(told) > 10 else f"WRONG: {text[:200]}"
        expected = self.expected.setdefault(question, content)
        return "right" if content == expected else f"WRONG: {content[:80]!r} is not {expected[:80]!r}"

    def recovers(self, since_s: float, right_at: Sequence[float]) -> float | None:
        """Seconds from `since_s` to a right answer, maybe one of those at `right_at`; None if it is late."""
        while not (after := [at for at in right_at if at > since_s]):
            if time.monotonic() > since_s + RECOVERY_S:
                return None
            if self.ask(QUESTIONS[0]) == "right":
                right_at = [time.monotonic()]
            time.sleep(PAUSE_S)
        seconds = min(after) - since_s
        return seconds if seconds <= RECOVERY_S else None

    def is_served(self, most_s: float) -> bool:
        """Whether a question is answered rightly within this time."""
        until = time.monotonic() + most_s
        while time.monotonic() < until:
            if self.ask(QUESTIONS[0]) == "right":
                return True
            time.sleep(PAUSE_S)
        return False

    @property
    def ending(self) -> list[str]:
        """The last lines of its log."""
        return self.log.read_text(errors="replace").splitlines()[-40:]


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
def serving(library: Path, folder: Path, control: Path) -> Iterator[Server]:
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
        yield Server(process, _port_of(process, log), log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """Where the server listens; 0 where it ended before it did."""
    while True:
        text = log.read_text(errors="replace")
        if "listening on " in text and "\n" in text.split("listening on ")[1]:
            return int(text.split("listening on ")[1].split()[0].rpartition(":")[2])
        if process.poll() is not None:
            return 0
        time.sleep(0.05)
