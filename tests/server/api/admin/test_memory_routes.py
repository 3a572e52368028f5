"""POST /memory/plan: what is passed on to the engine, and what comes of its answers."""

import pytest
from starlette.testclient import TestClient

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.app import make_app
from server.api.service import Service
from server.link.messages import Failed
from tests.server.api.scripted import ScriptedEngine


def test_a_budget_is_written_as_the_flag_and_the_answer_is_the_plan(
    client: TestClient, engine: ScriptedEngine
) -> None:
    for base in ("/v1", "/api/v1", ""):
        answer = client.post(f"{base}/memory/plan", json={"ram_budget": "96GiB", "expert_policy": "lru"})
        assert answer.status_code == 202
        data = answer.json()["data"]
        assert data == {"status": "accepted", "expert_policy": "lru", "lines": {"experts": 96 * 2**30}}
        command = engine.replanned[-1]
        assert (command.ram_budget_bytes, command.expert_policy) == (96 * 2**30, "lru")
    assert len({command.request_id for command in engine.replanned}) == 3


def test_what_is_not_given_stays(client: TestClient, engine: ScriptedEngine) -> None:
    assert client.post("/v1/memory/plan", json={"expert_policy": "lru"}).status_code == 202
    assert client.post("/v1/memory/plan", json={"ram_budget": "1G"}).status_code == 202
    asked = [(command.ram_budget_bytes, command.expert_policy) for command in engine.replanned]
    assert asked == [(None, "lru"), (10**9, None)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give 'ram_budget', 'expert_policy' or both"),
        ({"ram_budget": "much"}, "'much' is not a size; write 100G"),
        ({"ram_budget": "0"}, "is not a size"),
        ({"ram_budget": "0.4"}, "is not a size"),
        ({"ram_budget": "9" * 400}, "is not a size"),
        ({"ram_budget": "9" * 300 + "T"}, "is not a size"),
        ({"ram_budget": 10**9}, "ram_budget"),
        ({"expert_policy": "mru"}, "expert_policy"),
        ({"ram_budget": "1G", "max_context": 9}, "'max_context' is not supported"),
    ],
)
def test_a_body_that_says_nothing_clear_is_refused(
    client: TestClient, engine: ScriptedEngine, body: dict[str, object], words: str
) -> None:
    answer = client.post("/v1/memory/plan", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert engine.replanned == []


def test_a_refusal_of_the_engine_is_the_clients_fault_and_keeps_its_numbers(
    client: TestClient, engine: ScriptedEngine
) -> None:
    engine.refusal = Failed("plan", "request", "a budget of 1.0 GB is too small: it needs 2.0G")
    answer = client.post("/v1/memory/plan", json={"ram_budget": "1G"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "a budget of 1.0 GB is too small: it needs 2.0G"
    assert answer.headers["x-should-retry"] == "false"


def test_without_an_engine_the_answer_is_to_come_back(client: TestClient, engine: ScriptedEngine) -> None:
    engine.refusal = Failed("plan", "died", "the engine process ended (signal 9)")
    answer = client.post("/v1/memory/plan", json={"ram_budget": "1G"})
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "true"
    engine.ready, engine.refusal = False, None
    assert client.post("/v1/memory/plan", json={"ram_budget": "1G"}).status_code == 503


def test_it_takes_an_admins_key_where_there_are_keys(service: Service, engine: ScriptedEngine) -> None:
    ring = KeyRing.of({"secret": Key("a", is_admin=True)})
    client = TestClient(make_app(service, Access(ring)))
    body = {"ram_budget": "1G"}
    assert client.post("/v1/memory/plan", json=body).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert client.post("/v1/memory/plan", json=body, headers=headers).status_code == 202
