"""Eight agents behind vLLM's router and two servers: prompts are found again, a killed server is survived."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from server.engine.cluster.meeting import free_address
from tests.server.serving.running import Server, start_server, stop_server
from tests.waiting import wait_until

ROUTER = Path(sys.prefix) / "clients" / "bin" / "vllm-router"
NUM_AGENTS, NUM_TURNS = 8, 6
SYSTEM = "You add numbers, one after the other, and answer with the sum alone. " * 4
TRIES, PAUSE_S = 30, 1.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not ROUTER.exists(), reason="`make test` puts the router into .venv/clients"),
]


@contextmanager
def routed(servers: list[Server]) -> Iterator[str]:
    """Where a router listens that prefers the server that knows the beginning of a prompt."""
    port, metrics = (free_address("127.0.0.1:0").split(":")[1] for _ in range(2))
    words = ["--worker-urls", *(server.url for server in servers), "--policy", "cache_aware"]
    router = subprocess.Popen(
        [str(ROUTER), *words, "--port", port, "--prometheus-port", metrics],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: routes(f"http://127.0.0.1:{port}"), 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        router.kill()
        router.wait()


def routes(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def talk(url: str, name: str, go_on: Event) -> list[str]:
    """One agent's turns; what fails is asked again, and how it failed is returned."""
    failures: list[str] = []
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for turn in range(NUM_TURNS):
        messages.append({"role": "user", "content": f"I am {name}. What is {turn + 1}+{turn}?"})
        messages.append({"role": "assistant", "content": ask(url, messages, failures)})
        if turn == 1:
            go_on.wait()
    return failures


def ask(url: str, messages: list[dict[str, Any]], failures: list[str]) -> str:
    body = {"model": "glmserve/pocket", "messages": messages, "max_tokens": 8, "temperature": 0}
    for _ in range(TRIES):
        try:
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            if answer.status_code == 200 and "choices" in answer.json():
                return answer.json()["choices"][0]["message"]["content"] or "..."
            failures.append(f"{answer.status_code}: {answer.text[:100]}")
        except httpx.TransportError as error:
            failures.append(repr(error))
        time.sleep(PAUSE_S)
    raise AssertionError(f"no answer: {failures[-3:]}")


def run_agents(url: str, kind: str, kill: Server | None = None) -> list[str]:
    go_on = Event()
    with ThreadPoolExecutor(NUM_AGENTS) as pool:
        agents = [pool.submit(talk, url, f"{kind} {number}", go_on) for number in range(NUM_AGENTS)]
        if kill:
            time.sleep(2.0)
            kill.process.send_signal(signal.SIGKILL)
        go_on.set()
        return [failure for agent in agents for failure in agent.result()]


def share_found(servers: list[Server]) -> float:
    """Tokens of prompts that were restored, of all that were asked for."""
    asked, restored = 0.0, 0.0
    for server in servers:
        text = httpx.get(f"{server.url}/metrics").text
        asked += float(re.findall(r"^glmserve_prefix_asked_tokens_total (\S+)$", text, re.M)[0])
        restored += float(re.findall(r"^glmserve_prefix_restored_tokens_total (\S+)$", text, re.M)[0])
    return restored / asked


def test_agents_find_their_prompts_again_and_go_on_when_a_server_is_killed() -> None:
    with ExitStack() as stack:
        servers = [start_server() for _ in range(3)]
        for server in servers:
            stack.callback(stop_server, server)
        alone, *pair = servers
        assert run_agents(alone.url, "agent") == []
        url = stack.enter_context(routed(pair))
        assert run_agents(url, "agent") == []
        one, two = share_found([alone]), share_found(pair)
        print(f"found again: one server {one:.3f}, two behind the router {two:.3f}")
        assert two >= 0.9 * one
        failures = run_agents(url, "heir", kill=pair[0])
        print(f"failures told to agents: {failures}")
