"""Bodies with random damage: an answer or a refusal, never a fault of ours."""

import copy
import json
import random
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.api.answer.test_tool_calls import TOOLS
from tests.server.api.dialects.test_dialects import messages, responses

CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
SEED: dict[str, Any] = {
    "model": "z-ai/glm-5.2",
    "models": ["z-ai/glm-5.2"],
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be terse."}]},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_details": [{"type": "reasoning.text", "text": "hm", "index": 0}],
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "c", "content": "4 C"},
    ],
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "reasoning": {"effort": "high", "max_tokens": 5},
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "seed": 5,
    "max_tokens": 20,
    "stream": False,
    "session_id": "s",
}
MESSAGES = {"model": "z-ai/glm-5.2", "stop_sequences": ["x"], "temperature": 0.5} | messages()
RESPONSES = {"model": "z-ai/glm-5.2", "top_logprobs": 2, "text": {"format": {"type": "text"}}} | responses()
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, 1e308, "", "x", "\x00", "👋" * 50, "<tool_call>", [], {}, [[]], {"a": {}},
    ["x"], [None], {"$ref": "#"}, {"type": "object"}, {"type": ["string", 5]}, "required", "json_object",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in steps for place in places(inner, (*path, key)))]


def mutate(seed: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(seed)
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice(places(body)[1:])
        parent: Any = body
        for step in path:
            parent = parent[step]
        match chance.randrange(3):
            case 0:
                del parent[last]
            case 1:
                parent[last] = copy.deepcopy(chance.choice(JUNK))
            case _ if isinstance(parent, dict):
                parent[str(chance.choice(JUNK))[:20]] = copy.deepcopy(chance.choice(JUNK))
            case _:
                parent.append(copy.deepcopy(chance.choice(JUNK)))
    return body


def check(client: TestClient, number: int) -> None:
    """Chat completions twice as often as the others."""
    chance = random.Random(number)
    path, seed = [("chat/completions", SEED), ("messages", MESSAGES), ("responses", RESPONSES)][
        number % 4 % 3
    ]
    raw = json.dumps(mutate(seed, chance)).encode()
    if chance.random() < 0.2:
        position = chance.randrange(len(raw))
        raw = raw[:position] + bytes([chance.randrange(256)]) + raw[position + chance.randint(0, 3) :]
    response = client.post(f"/api/v1/{path}", content=raw)
    assert response.status_code in (200, 400), (number, response.text, raw)
    if response.status_code == 400:
        assert response.json()["error"]["message"]


def test_150_damaged_bodies(client: TestClient) -> None:
    for number in range(150):
        check(client, number)


@pytest.mark.long
def test_10000_damaged_bodies(client: TestClient) -> None:
    for number in range(150, 10_150):
        check(client, number)
