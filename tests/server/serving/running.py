"""Runs the whole program as a user does: `glmserve` in a process of its own, Pocket behind a real socket."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from server.commands.checkpoint import POCKET

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 60
SUM = "What is 17+25?"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=120, max_retries=0)


def start_server(*flags: str, leads_group: bool = False) -> Server:
    """Starts this checkout's server on a free port and waits until it answers."""
    return start([sys.executable, "-u", "-m", "server.cli"], *flags, leads_group=leads_group)


def start(command: Sequence[str], *flags: str, cwd: Path = ROOT, leads_group: bool = False) -> Server:
    """Starts `command` on Pocket and a free port, which is read from its log, and waits until it answers.

    `leads_group`: its processes are a group of their own, which can be sent a signal.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLMSERVE_")}
    env["GLMSERVE_PREFIX_CACHE_SIZE"] = "0"  # a flag wins: tests share no files that they do not name
    process = subprocess.Popen(
        [*command, "--model", str(POCKET), "--port", "0", *flags],
        cwd=cwd,
        env=env,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=leads_group,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening on" in line:
            break
    else:
        raise AssertionError("".join(lines))
    url = lines[-1].split("listening on ")[1].split()[0]
    deadline = time.monotonic() + START_TIMEOUT_S
    while httpx.get(url + "/health", timeout=10).status_code != 200:
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.1)
    return Server(process, url)


def stop_server(server: Server) -> None:
    server.process.terminate()
    server.process.wait(20)
    assert server.process.stderr is not None
    server.process.stderr.close()


def ask(server: Server, text: str) -> str:
    """The greedy answer to one question."""
    with server.openai() as api:
        answer = api.chat.completions.create(
            model="glmserve/pocket",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=200,
        )
    return answer.choices[0].message.content or ""


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
