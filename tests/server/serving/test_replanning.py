"""Another budget under way, as a user gives it: Pocket streamed, over HTTP, and through an engine's death."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.serving.running import SUM, Server, ask, start_server, stop_server

BUDGET = "805M"


@pytest.fixture(scope="module")
def streamed() -> Iterator[Server]:
    started = start_server("--stream-experts", "--ram-budget", BUDGET)
    yield started
    stop_server(started)


def change(server: Server, **body: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/memory/plan", json=body, timeout=30)


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^glmserve_{re.escape(name)} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def wait_for(server: Server, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while metric(server, name) != value:
        assert time.monotonic() < deadline, f"{name} is {metric(server, name)}, not {value}"
        time.sleep(0.1)


def engine_of(server: Server) -> int:
    pid = server.process.pid
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.slow
def test_a_budget_and_a_policy_are_changed_shown_and_outlive_the_engine(streamed: Server) -> None:
    before, slots = ask(streamed, SUM), metric(streamed, "expert_slots")
    assert "42" in before
    answer = change(streamed, ram_budget="795M", expert_policy="lru")
    assert answer.status_code == 202, answer.text
    plan = answer.json()["data"]
    assert (plan["budget_bytes"], plan["expert_policy"]) == (795 * 10**6, "lru")
    assert sum(plan["slots_per_layer"]) < slots
    wait_for(streamed, "expert_slots", sum(plan["slots_per_layer"]))
    wait_for(streamed, "ram_budget_bytes", 795e6)
    assert metric(streamed, 'expert_policy{policy="lru"}') == 1
    assert metric(streamed, 'memory_planned_bytes{line="experts"}') == plan["lines"]["experts"]
    assert metric(streamed, 'memory_used_bytes{line="experts"}') == plan["lines"]["experts"]
    assert ask(streamed, SUM) == before

    pid = engine_of(streamed)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while metric(streamed, "ready") or engine_of_or_none(streamed) in (pid, None):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wait_for(streamed, "ready", 1)
    wait_for(streamed, "ram_budget_bytes", 795e6)
    assert metric(streamed, 'expert_policy{policy="lru"}') == 1
    assert metric(streamed, 'expert_policy{policy="nearness"}') == 0
    assert ask(streamed, SUM) == before

    plan = change(streamed, ram_budget=BUDGET).json()["data"]
    wait_for(streamed, "expert_slots", sum(plan["slots_per_layer"]))
    assert ask(streamed, SUM) == before


def engine_of_or_none(server: Server) -> int | None:
    try:
        return engine_of(server)
    except ValueError:  # between one and the next
        return None


@pytest.mark.slow
def test_what_the_plan_does_not_allow_is_refused_with_the_numbers(streamed: Server) -> None:
    before = metric(streamed, "ram_budget_bytes")
    for body, words in (
        ({"ram_budget": "100M", "expert_policy": "nearness"}, r"100\.0 MB is too small.* needs 7\d\d\.\dM"),
        ({"ram_budget": "900T"}, r"900\.0 TB is above the memory of this machine: [\d.]+ GB"),
        ({"ram_budget": "some"}, "is not a size"),
        ({}, "give 'ram_budget'"),
    ):
        answer = change(streamed, **body)
        assert answer.status_code == 400
        assert re.search(words, answer.json()["error"]["message"]), answer.text
    needed = re.search(r"needs (\S+);", change(streamed, ram_budget="100M").json()["error"]["message"])
    assert needed
    assert metric(streamed, "ram_budget_bytes") == before
    assert change(streamed, ram_budget=needed[1]).status_code == 202, "the budget that is named is taken"


@pytest.mark.slow
def test_a_model_that_is_all_in_memory_needs_a_restart(server: Server) -> None:
    answer = change(server, ram_budget="1G")
    assert answer.status_code == 400
    assert "needs a restart" in answer.json()["error"]["message"]
