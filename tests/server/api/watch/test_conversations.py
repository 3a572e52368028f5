"""Agents without a name of their own are told apart by the conversation that each request continues."""

import logging
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.api.access.conversations import MANY, RECENT_S, Conversations, pieces_of_text
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
Message = dict[str, Any]


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def converse(
    client: TestClient, engine: ScriptedEngine, opening: list[Message], turns: int, **kw: Any
) -> list[str]:
    """The engine's name for the agent at each turn of one conversation."""
    messages, names = list(opening), []
    for turn in range(turns):
        answer = client.post(CHAT, json={"messages": messages}, **kw).json()["choices"][0]["message"]
        names.append(engine.requests[-1].agent)
        messages += [say("assistant", answer["content"]), say("user", f"and then {turn}?")]
    return names


@pytest.mark.parametrize("titles", [["one"] * 6, [f"agent {n}" for n in range(6)], [None] * 6])
def test_a_stock_fleet_of_six_is_six_agents_whatever_titles_it_sends(
    client: TestClient, engine: ScriptedEngine, titles: list[str | None]
) -> None:
    agents = []
    for number, title in enumerate(titles):
        headers = {"Authorization": "Bearer k"} | ({"X-Title": title} if title else {})
        opening = [say("system", "You are terse."), say("user", f"task {number}")]
        names = converse(client, engine, opening, turns=3, headers=headers)
        assert len(set(names)) == 1, "a conversation stays one agent"
        agents.append(names[0])
    assert len(set(agents)) == 6


def test_openai_python_needs_no_line_of_change(base_url: str, engine: ScriptedEngine) -> None:
    for turn in range(2):
        for number in range(6):
            with openai.OpenAI(
                base_url=base_url + "/v1", api_key="k", default_headers={"X-Title": f"agent {number}"}
            ) as api:
                history: Any = [say("user", "same task")] + [
                    say("assistant", "Hi"),
                    say("user", "go on"),
                ] * turn
                api.chat.completions.create(model="z-ai/glm-5.2", messages=history)
    first, second = ([one.agent for one in engine.requests[start : start + 6]] for start in (0, 6))
    assert len(set(first)) == 6
    assert first == second, "titles alone tell agents with one prompt apart, and later turns keep them"


def test_names_and_keys_come_before_conversations(client: TestClient, engine: ScriptedEngine) -> None:
    for more in ({"session_id": "s"}, {"user": "u"}):
        agents = set()
        for text in ("a", "b", "c"):
            client.post(CHAT, json={"messages": [say("user", text)]} | more)
            agents.add(engine.requests[-1].agent)
        assert len(agents) == 1, more
    agents = set()
    for key in ("one", "two"):
        client.post(CHAT, json={"messages": [say("user", "x")]}, headers={"Authorization": f"Bearer {key}"})
        agents.add(engine.requests[-1].agent)
    assert len(agents) == 2, "one key's conversation is not another's"


def test_a_conversation_that_forks_is_two_and_a_retry_is_the_same() -> None:
    known = Conversations()
    first = known.find("k", "", ["s", "u"])
    assert known.find("k", "", ["s", "u"]) == first, "a retry"
    assert known.find("k", "", ["s", "u", "a1", "t1"]) == first
    fork = known.find("k", "", ["s", "u", "a2", "t2"])
    assert fork != first, "two agents that began alike"
    assert known.find("k", "", ["s", "u", "a2", "t2", "a", "t"]) == fork
    assert known.find("k", "", ["s", "u", "a1", "t1", "a", "t"]) == first
    assert known.find("k", "", ["s", "other"]) not in (first, fork), "a system prompt is shared by all"
    assert known.find("other", "", ["s", "u"]) != first


def test_plain_prompts_and_token_ids_continue_too() -> None:
    known = Conversations()
    for prompt, longer in (("a" * 200, "a" * 200 + "b" * 70), (list(range(200)), list(range(300)))):
        first = known.find("k", "", pieces_of_text(prompt))
        assert known.find("k", "", pieces_of_text(longer)) == first
    assert known.find("k", "", pieces_of_text("hi")) != known.find("k", "", pieces_of_text("ho"))


@pytest.mark.parametrize("name", [{"session_id": "fleet"}, {"user": "fleet"}, {"title": "fleet"}])
def test_many_conversations_with_one_name_are_said_once(
    client: TestClient, caplog: pytest.LogCaptureFixture, name: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO)
    name = dict(name)
    title = name.pop("title", None)
    key = f"Bearer {sorted(name) or title}"
    headers = {"Authorization": key} | ({"X-Title": title} if title else {})
    for turn in range(3 * MANY):
        client.post(CHAT, json={"messages": [say("user", f"task {turn}")]} | name, headers=headers)
    said = [one for one in caplog.records if "conversations share the name" in one.message]
    assert len(said) == 1
    assert "fleet" in said[0].message
    assert "session_id" in said[0].message


def test_one_person_with_many_conversations_a_day_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    known = Conversations(lambda: now[0])
    for turn in range(3 * MANY):
        now[0] += RECENT_S
        known.find("user u", "local 'u'", [f"task {turn}"])
    assert caplog.records == []


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.access.conversations.MAX_KNOWN", 10)
    known = Conversations()
    for number in range(100):
        known.find("k", "", [f"{number}"])
    assert len(known._known) <= 10
    assert len(known._ends) <= 10
