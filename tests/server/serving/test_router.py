"""The routers of vLLM and SGLang, as PyPI has them, in front of two servers: no client notices."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.server.serving.running import ROOT, Server, start_server, stop_server

BINARIES = Path(sys.prefix) / "clients" / "bin"
# SGLang's asks its workers for more than clients do, and adds parameters of its own.
COMMANDS = {"vllm-router": ["vllm-router"], "sglang-router": ["sglang-router", "launch"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
    pytest.mark.skipif(
        not all((BINARIES / name).exists() for name in COMMANDS),
        reason="`make test` puts the routers into .venv/clients",
    ),
]


@pytest.fixture(scope="module")
def second_server() -> Iterator[Server]:
    started = start_server()
    yield started
    stop_server(started)


@pytest.fixture(params=COMMANDS)
def router_url(server: Server, second_server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a router listens that asks both in turn."""
    port, metrics_port = (_free_port() for _ in range(2))
    workers = [server.url, second_server.url]
    binary, *words = COMMANDS[request.param]
    command: list[str] = [
        str(BINARIES / binary),
        *words,
        "--worker-urls",
        *workers,
        "--policy",
        "round_robin",
        "--port",
        str(port),
    ]
    router = subprocess.Popen(
        [*command, "--prometheus-port", str(metrics_port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _until_it_routes(url)
        yield url
    finally:
        router.kill()
        router.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _until_it_routes(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/v1/models", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the router did not become ready"
        time.sleep(0.2)


def test_a_client_behind_the_router_notices_nothing(
    router_url: str, server: Server, second_server: Server
) -> None:
    before = [_num_prompt_tokens(one) for one in (server, second_server)]
    talk = [sys.executable, "-m", "tests.server.serving.clients.openai_talk", router_url]
    done = subprocess.run(talk, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    heard = json.loads(done.stdout)
    assert heard["chat"]["text"] == heard["stream"]["text"]
    assert "42" in heard["chat"]["thought"]
    assert heard["tools"]["calls"] == [{"city": "Oslo"}, {"city": "Madrid"}]
    assert heard["json_schema"].keys() == {"city", "is_sunny"}
    assert "temperature" in heard["error"]
    after = [_num_prompt_tokens(one) for one in (server, second_server)]
    assert all(now > then for then, now in zip(before, after, strict=True)), "both had a share"


def _num_prompt_tokens(server: Server) -> float:
    """Tokens of all prompts that the server has looked for in its prefix cache."""
    text = httpx.get(f"{server.url}/metrics").text
    [value] = re.findall(r"^glmserve_prefix_asked_tokens_total (\S+)$", text, re.M)
    return float(value)
