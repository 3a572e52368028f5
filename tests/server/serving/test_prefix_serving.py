"""The prefix cache of the whole program: Pocket behind a socket, killed, restarted, and on a bad disk."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.server.serving.clients.common import TOOL
from tests.server.serving.running import Server, start_server, stop_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]

# Some 400 tokens: the answer at the end depends on all of them having been read.
STORY = " ".join(f"The box number {number} holds {number * 7 % 50} coins." for number in range(25))
MESSAGES: list[Any] = [
    {"role": "system", "content": STORY},
    {"role": "user", "content": "What is 17+25?"},
]


def flags(directory: Path) -> list[str]:
    return ["--prefix-cache-dir", str(directory), "--prefix-cache-size", "1G"]


@contextmanager
def serving(*given: str) -> Iterator[Server]:
    server = start_server(*given)
    try:
        yield server
    finally:
        stop_server(server)


def ask(server: Server, messages: list[Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 200, **fields}
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def said(result: dict[str, Any]) -> tuple[str, str]:
    message = result["choices"][0]["message"]
    return message.get("reasoning", ""), message["content"]


def cached(result: dict[str, Any]) -> int:
    return int(result["usage"]["prompt_tokens_details"]["cached_tokens"])


def wait_for_files(directory: Path) -> None:
    """Blocks are written behind the answer: wait until no more come."""
    count = -1
    while (now := len(list(directory.glob("*.kv")))) != count or not now:
        count = now
        time.sleep(0.5)


def test_a_prompt_survives_kill_9_and_the_text_is_the_same(tmp_path: Path) -> None:
    server = start_server(*flags(tmp_path))
    first = ask(server, MESSAGES)
    wait_for_files(tmp_path)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(20)
    assert server.process.stderr
    server.process.stderr.close()
    with serving(*flags(tmp_path)) as server:
        again = ask(server, MESSAGES)
        assert cached(first) == 0
        assert cached(again) == again["usage"]["prompt_tokens"] - 1
        assert said(again) == said(first)


@pytest.mark.long
def test_two_servers_share_a_directory_and_streamed_experts_share_it_too(tmp_path: Path) -> None:
    with serving(*flags(tmp_path)) as one, serving(*flags(tmp_path), "--stream-experts") as two:
        first = ask(one, MESSAGES)
        wait_for_files(tmp_path)
        again = ask(two, MESSAGES)
        assert cached(again) == again["usage"]["prompt_tokens"] - 1
        assert said(again) == said(first)


@pytest.mark.long
def test_without_a_prefix_cache_every_prompt_is_read_anew() -> None:
    with serving("--prefix-cache-memory", "0") as server:
        assert [cached(ask(server, MESSAGES)) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    "strips", [pytest.param(False, marks=pytest.mark.long), True], ids=["as it was", "reasoning stripped"]
)
def test_a_tool_loop_pays_for_its_new_tokens(server: Server, strips: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    length_before = 0
    for _ in range(4):
        result = ask(server, messages, tools=[TOOL])
        usage, message = result["usage"], result["choices"][0]["message"]
        num_prefilled = usage["prompt_tokens"] - cached(result)
        if length_before:
            assert num_prefilled <= usage["prompt_tokens"] - length_before + 1
        length_before = usage["total_tokens"] - 1  # the token that ended the turn was not read
        if strips:
            message = {key: value for key, value in message.items() if not key.startswith("reasoning")}
        messages.append(message)
        if message.get("tool_calls"):
            content = json.dumps({"city": "Oslo", "temperature": 7, "condition": "rain"})
            call_id = message["tool_calls"][0]["id"]
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            messages.append({"role": "user", "content": "And the weather in Bergen?"})
