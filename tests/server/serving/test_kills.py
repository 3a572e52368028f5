"""kill -9 of the engine at random moments, under clients: right answers or explicit errors, nothing else."""

import asyncio
import gc
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.glm.tokenizer import Tokenizer
from tests.server.behind_http import Served, body, served
from tests.waiting import wait_until

NUM_CLIENTS = 8
NUM_TOKENS = 12
BACK_AFTER_S = 5.0


@pytest.mark.parametrize(
    "num_kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_an_engine_that_is_killed_again_and_again(tokenizer: Tokenizer, num_kills: int) -> None:
    before = _possessions()
    outcomes: Counter[str] = Counter()
    downtimes: list[float] = []

    async def scenario() -> None:
        async with served(tokenizer, "plain") as server:
            stop = asyncio.Event()
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
                expected = [await _right_answer(http, tokenizer, first) for first in range(NUM_CLIENTS)]
                clients = [
                    asyncio.ensure_future(_client(http, n, expected[n], outcomes, stop))
                    for n in range(NUM_CLIENTS)
                ]
                watcher = asyncio.ensure_future(_watch_health(http, stop))
                await _kill_often(server, num_kills, downtimes)
                stop.set()
                await asyncio.gather(*clients, watcher)
                assert server.engine._requests == {}
                new = set(_children()) - set(before["children"])
                assert len(new) == 1, "one engine, and no other process"

    asyncio.run(scenario())
    assert set(outcomes) <= {"right", "refused", "error event"}, outcomes
    assert outcomes["right"] >= num_kills
    assert max(downtimes) <= BACK_AFTER_S
    shared = before.pop("shared memory")
    wait_until(lambda: set(_shared_memory()) <= set(shared))  # other processes of the tests come and go
    after = _possessions()
    after.pop("shared memory")
    assert after.pop("descriptors") <= before.pop("descriptors")
    assert (Counter(after.pop("threads")) - Counter(before.pop("threads"))) == Counter()
    assert after == before


async def _kill_often(server: Served, num_kills: int, downtimes: list[float]) -> None:
    rng = random.Random(7)
    for _ in range(num_kills):
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        pid = server.engine.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        while server.engine.pid in (pid, None) or server.engine.status.state != "ready":
            await asyncio.sleep(0.01)
        downtimes.append(time.monotonic() - killed_at)


async def _client(
    http: httpx.AsyncClient, number: int, expected: str, outcomes: Counter[str], stop: asyncio.Event
) -> None:
    """Asks again and again, by turns streamed and whole."""
    while not stop.is_set():
        for outcome in (_ask_whole, _ask_streamed):
            outcomes[await outcome(http, number, expected)] += 1
        await asyncio.sleep(0.02)


async def _ask_whole(http: httpx.AsyncClient, number: int, expected: str) -> str:
    answer = await http.post("/v1/completions", json=body(number, NUM_TOKENS))
    if answer.status_code == 200:
        return "right" if answer.json()["choices"][0]["text"] == expected else f"wrong: {answer.text}"
    is_explicit = answer.json()["error"]["code"] == answer.status_code == 503
    can_retry = answer.headers["x-should-retry"] == "true" and int(answer.headers["retry-after"]) > 0
    return "refused" if is_explicit and can_retry else f"{answer.status_code}: {answer.text}"


async def _ask_streamed(http: httpx.AsyncClient, number: int, expected: str) -> str:
    text, events = "", []
    async with http.stream("POST", "/v1/completions", json=body(number, NUM_TOKENS, stream=True)) as answer:
        if answer.status_code != 200:
            return "refused" if answer.status_code == 503 else f"{answer.status_code}"
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
    if events[-1] == "[DONE]":
        text = "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])
        return "right" if text == expected else f"wrong: {text!r}"
    error = json.loads(events[-1])["error"]
    return "error event" if error["code"] == 503 and "try again" in error["message"] else f"odd: {error}"


async def _right_answer(http: httpx.AsyncClient, tokenizer: Tokenizer, first: int) -> str:
    answer = await http.post("/v1/completions", json=body(first, NUM_TOKENS))
    text: str = answer.json()["choices"][0]["text"]
    assert text == tokenizer.decode([first + 1 + i for i in range(NUM_TOKENS)])
    return text


async def _watch_health(http: httpx.AsyncClient, stop: asyncio.Event) -> None:
    """HTTP answers all along."""
    while not stop.is_set():
        asked_at = time.monotonic()
        assert (await http.get("/health")).status_code in (200, 503)
        assert time.monotonic() - asked_at < 2
        await asyncio.sleep(0.05)


def _children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


KEPT = ("AnyIO", "requests", "large-requests")


def _possessions() -> dict[str, Any]:
    """What must not grow. Threads that render prompts are kept for a while."""
    gc.collect()  # what earlier tests have left must not be counted
    return {
        "children": _children(),
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith(KEPT)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": _shared_memory(),
    }


def _shared_memory() -> list[str]:
    return sorted(os.listdir("/dev/shm"))
