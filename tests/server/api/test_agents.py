"""What a request says of its agent and priority reaches the engine; a full line refuses before headers."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from config.errors import BusyError
from tests.server.api.scripted import ScriptedEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALL = {"Authorization": "Bearer k", "X-Title": "t"}


def body(path: str, **more: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    )
    return prompt | more


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_session_counts_first_then_the_user_each_of_its_key_then_the_conversation(
    client: TestClient, engine: ScriptedEngine, path: str
) -> None:
    for headers, more in (
        (ALL, {"session_id": "s", "user": "u"}),
        (ALL, {"user": "u"}),
        (ALL, {}),
        ({"X-Title": "t"}, {}),
        ({}, {}),
    ):
        assert client.post(path, json=body(path, **more), headers=headers).status_code == 200
    session, user, both, title, nobody = (request.agent for request in engine.requests)
    key, _, conversation = both.partition(" title t conversation ")
    assert (session, user) == (f"{key} session s", f"{key} user u")
    assert title.startswith("title t conversation ")
    assert nobody.startswith("conversation ")
    assert key.startswith("key ")
    assert conversation
    assert "Bearer" not in key


def test_a_session_of_one_key_is_not_that_of_another(client: TestClient, engine: ScriptedEngine) -> None:
    secret = [{"role": "user", "content": "the secret is 123"}]
    guess = [{"role": "user", "content": "the secret is what?"}]
    more = {"session_id": "s", "user": "u"}
    client.post(CHAT, json={"messages": secret} | more, headers={"Authorization": "Bearer one"})
    answer = client.post(CHAT, json={"messages": guess} | more, headers={"Authorization": "Bearer two"})
    found = client.get(f"/v1/cache/explain?id={answer.headers['x-generation-id']}").json()["data"]
    assert (found["there"], found["compared_with"]) == ("", None)
    client.post(CHAT, json={"messages": guess} | more, headers={"X-Api-Key": "one"})
    one, two, again = (request.agent for request in engine.requests)
    assert one == again != two


def test_a_name_without_end_is_not_kept(client: TestClient, engine: ScriptedEngine) -> None:
    answer = client.post(CHAT, json=body(CHAT, user="u" * 1_000_000))
    receipt = client.get(f"/v1/generation?id={answer.json()['id']}").json()["data"]
    assert receipt["external_user"] == "u" * 1024
    assert len(engine.requests[0].agent) < 2000


def test_flex_is_background_and_other_tiers_are_not(client: TestClient, engine: ScriptedEngine) -> None:
    for tier in ("flex", "auto", "priority", None):
        client.post(CHAT, json=body(CHAT, service_tier=tier))
    assert [request.priority for request in engine.requests] == ["background"] + ["interactive"] * 3


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_line_is_a_503_with_the_time_to_come_back(
    client: TestClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    def refuse(_: ScriptedEngine) -> None:
        raise BusyError("64 requests wait already; try again in 17 s", 17)

    monkeypatch.setattr(ScriptedEngine, "reserve", refuse)
    answer = client.post(path, json=body(path, stream=stream))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "17"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.json()["error"]["metadata"]["error_type"] == "provider_overloaded"
    assert engine.requests == []
