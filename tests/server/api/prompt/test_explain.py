"""Where a prompt departs from the one before: in a header, in the log, and on request."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.access.receipts import Caller
from server.api.prompt.explain import MAX_CONVERSATIONS, Explainer, locate
from server.glm.tokenizer import Tokenizer
from server.link.messages import Generate
from tests.server.api.answer.test_tool_calls import TOOLS
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"


def post(client: TestClient, system: str, *user: str, session: str = "one", **fields: Any) -> tuple[str, str]:
    """The id of an answer, and its header."""
    messages = [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": text} for text in user]
    response = client.post(CHAT, json={"messages": messages, "session_id": session, **fields})
    assert response.status_code == 200, response.text
    return response.headers["X-Generation-Id"], response.headers.get("X-Glmserve-Cache", "")


def explain(client: TestClient, request_id: str) -> dict[str, Any]:
    response = client.get("/v1/cache/explain", params={"id": request_id})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["data"]
    return found


def test_a_clock_in_the_system_prompt_is_named_to_the_character(
    client: TestClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    post(client, "Be brief. It is 12:01 now.", "hello")
    request_id, header = post(client, "Be brief. It is 12:02 now.", "hello")
    num_prompt = len(engine.requests[-1].token_ids)
    assert header == f"cached=0/{num_prompt} diverged=messages[0].content@20"
    assert header in caplog.text
    found = explain(client, request_id)
    assert (found["here"][0], found["there"][0]) == ("2", "1")
    assert found["before"].endswith("It is 12:0")
    assert found["diverged"] == "messages[0].content@20"


def test_what_only_adds_to_an_earlier_prompt_departs_nowhere(client: TestClient) -> None:
    _, first = post(client, "Be brief.", "hello", session="adding")
    request_id, again = post(client, "Be brief.", "hello", session="adding")
    assert "diverged" not in first + again
    message = client.post(CHAT, json={"messages": [{"role": "user", "content": "hello"}]}).json()
    turn = [{"role": "user", "content": "hello"}, message["choices"][0]["message"]]
    response = client.post(CHAT, json={"messages": [*turn, {"role": "user", "content": "and?"}]})
    assert "diverged" not in response.headers["X-Glmserve-Cache"]
    assert explain(client, response.headers["X-Generation-Id"])["replayed_turns"] == 1
    assert explain(client, request_id)["shared_tokens"] == explain(client, request_id)["prompt_tokens"]


def test_a_stream_tells_in_its_header_what_is_known_before_the_engine_answers(client: TestClient) -> None:
    post(client, "Be brief.", "hello")
    request_id, header = post(client, "Be brief.", "good bye", stream=True)
    assert header == "diverged=messages[1].content@0"
    assert explain(client, request_id)["cached_tokens"] == 0


def test_agents_are_compared_with_themselves(client: TestClient) -> None:
    post(client, "Be brief.", "hello", session="one")
    assert "diverged" not in post(client, "Be long.", "hello", session="two")[1]
    assert "diverged" in post(client, "Be long.", "hello", session="one")[1]


def test_tools_come_before_the_system_prompt(client: TestClient) -> None:
    post(client, "Be brief.", "hello", tools=TOOLS)
    function = TOOLS[0]["function"]
    assert isinstance(function, dict)
    other = [{"type": "function", "function": {**function, "description": "The weather of a town."}}]
    _, header = post(client, "Be brief.", "hello", tools=other)
    assert "diverged=tools[0].description@17" in header


def test_an_agent_that_departs_early_time_after_time_is_told_so_once_in_a_while(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    for minute in range(10):
        post(client, f"It is 12:{minute}0 now.", "hello")
        post(client, "It is a fine day.", f"another {minute}", session="steady")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert "messages[0].content@9" in warnings[0]
    assert "steady" not in "".join(warnings)


def test_the_name_of_an_agent_makes_no_lines_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    for minute in range(5):
        post(client, f"It is 12:0{minute} now.", "hello", session="a\n12:00:00 ERROR all is lost")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings
    assert all(len(warning.splitlines()) == 1 for warning in warnings)


def test_unknown_ids_are_said_to_be_unknown(client: TestClient) -> None:
    response = client.get("/v1/cache/explain", params={"id": "gen-1"})
    assert response.status_code == 404
    assert "gen-1" in response.json()["error"]["message"]


def test_markup_belongs_to_the_part_behind_it() -> None:
    parts = [("a", "first", True), ("gone", "nowhere", True), ("b", "second", False)]
    text = "<|system|>first<|user|>second<|assistant|>"
    places = [str(locate(text, parts, text.index(word))) for word in ("<|s", "irst", "<|us", "cond", "<|as")]
    assert places == ["a@0", "a@1", "b@0", "b@2", "b@6"]


def test_little_is_kept(tokenizer: Tokenizer) -> None:
    explainer = Explainer()
    for number in range(2 * MAX_CONVERSATIONS):
        request = Generate(f"r{number}", tuple(range(number, number + 50)), 1)
        caller = Caller(user=f"{number % 7}")
        explainer.begin(request.request_id, caller, tokenizer, request.token_ids, [], [])
        explainer.end(request.request_id, 0, [1, 2])
    kept = [one for agent in explainer._agents.values() for one in agent.conversations]
    assert len(kept) <= MAX_CONVERSATIONS


def test_a_long_prompt_that_is_explained_keeps_nobody_waiting(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer, num_met, decode = Explainer(), 0, Tokenizer.decode
    others = ThreadPoolExecutor(1)

    def while_others_come(self: Tokenizer, token_ids: Sequence[int]) -> str:
        nonlocal num_met
        others.submit(explainer.end, "r1", 0, [4]).result(timeout=3)
        others.submit(explainer.begin, "r2", Caller(user="b"), tokenizer, [1, 2], [], []).result(timeout=3)
        num_met += 1
        return decode(self, token_ids)

    explainer.begin("r1", Caller(user="a"), tokenizer, [1, 2, 3, 4], [], [])
    monkeypatch.setattr(Tokenizer, "decode", while_others_come)
    found = explainer.begin("r3", Caller(user="a"), tokenizer, [1, 2, 5, 6], [], [])
    assert num_met
    assert (found.num_shared, found.other) == (2, "r1")
