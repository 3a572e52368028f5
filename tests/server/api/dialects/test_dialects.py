"""The same conversation is the same tokens in every dialect, so all of them share one prefix cache."""

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.service import Service
from server.glm.templates.template import ChatTemplate
from tests.server.api.scripted import ScriptedEngine

GLM = "z-ai/glm-5.2"
USER = {"role": "user", "content": "x"}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
THOUGHT, PATH, RESULT = "I must look.", " a/Ærø.py\n", "x = 1\n"


def chat() -> dict[str, Any]:
    function = {"name": "read", "description": "Reads.", "parameters": SCHEMA}
    call = {"name": "read", "arguments": '{"path": " a/Ærø.py\\n"}'}
    return {
        "messages": [
            {"role": "system", "content": "Be terse."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "at it"}],
            },
            {
                "role": "assistant",
                "content": "Yes.",
                "reasoning": THOUGHT,
                "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
            {"role": "user", "content": "And?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "reasoning_effort": "high",
    }


def messages() -> dict[str, Any]:
    use = {"type": "tool_use", "id": "call_1", "name": "read", "input": {"path": PATH}}
    return {
        "max_tokens": 8,
        "system": [{"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "at it"}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": THOUGHT, "signature": "glmserve"},
                    {"type": "text", "text": "Yes."},
                    use,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": RESULT},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        "tools": [{"name": "read", "description": "Reads.", "input_schema": SCHEMA}],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
    }


def responses() -> dict[str, Any]:
    return {
        "instructions": "Be terse.",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Look "}, {"type": "input_text", "text": "at it"}],
            },
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "read",
                "arguments": '{"path":" a/Ærø.py\\n"}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": RESULT},
            {"role": "user", "content": "And?"},
        ],
        "tools": [
            {
                "type": "function",
                "name": "read",
                "description": "Reads.",
                "parameters": SCHEMA,
                "strict": True,
            }
        ],
        "reasoning": {"effort": "high"},
    }


def test_one_conversation_is_one_prompt(client: TestClient, engine: ScriptedEngine) -> None:
    for path, body in (("chat/completions", chat()), ("messages", messages()), ("responses", responses())):
        for base in ("/v1", "/api/v1", ""):
            response = client.post(f"{base}/{path}", json={"model": GLM} | body)
            assert response.status_code == 200, response.text
    prompts = {tuple(request.token_ids) for request in engine.requests}
    assert len(engine.requests) == 9
    assert len(prompts) == 1
    counted = client.post(
        "/v1/messages/count_tokens", json={"model": GLM} | messages() | {"max_tokens": None}
    )
    assert counted.json() == {"input_tokens": len(engine.requests[0].token_ids)}, counted.text


DANGLING = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
DEEP = '{"a":' * 300 + "1" + "}" * 300
USE = {"type": "tool_use", "id": "c", "name": "f", "input": DEEP}
SAID = {"type": "function_call", "call_id": "c", "name": "f"}
HOSTED_CALL = {"type": "web_search_call", "id": "w"}
OWN = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("responses", {"input": [HOSTED_CALL, {"type": "function_call"}]}, "input[1].name"),
        ("responses", {"input": [HOSTED_CALL, SAID | {"arguments": DEEP}]}, "input[1].arguments"),
        ("responses", {"input": [HOSTED_CALL, {"role": "user"}]}, "input[1].content"),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            "responses",
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": DANGLING}}},
            "text.format",
        ),
        ("responses", {"tools": [{"type": "web_search"}, OWN | {"name": "a b"}]}, "tools[1].name"),
        (
            "responses",
            {"tools": [OWN, {"type": "namespace", "name": "n", "tools": [OWN | {"name": "a b"}]}]},
            "tools[1].tools[0].name",
        ),
        ("responses", {"tools": [OWN, OWN]}, "tools"),
        ("responses", {"tools": [OWN], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ("responses", {"tools": [OWN | {"parameters": DANGLING}], "tool_choice": "required"}, "tools"),
        ("messages", {"system": [{"type": "image"}]}, "system[0]"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}, USE]}, USER]},
            "messages[0].content[1].input",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [USE | {"name": None}]}, USER]},
            "messages[0].content[0].name",
        ),
        (
            "messages",
            {"tools": [{"type": "bash_20250124", "name": "b"}, {"name": "a b", "input_schema": {}}]},
            "tools[1].name",
        ),
        (
            "messages",
            {"output_config": {"format": {"type": "json_schema", "schema": DANGLING}}},
            "output_config.format",
        ),
        (
            "messages",
            {"tools": [{"name": "f", "input_schema": DANGLING}], "tool_choice": {"type": "any"}},
            "tools",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_told_in_the_clients_own_words(
    client: TestClient, path: str, fields: dict[str, Any], param: str
) -> None:
    own: dict[str, Any] = {"input": "x"} if path == "responses" else {"messages": [USER], "max_tokens": 9}
    response = client.post(f"/v1/{path}", json={"model": GLM} | own | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    foreign = ("response_format", ".function", "messages[" if path == "responses" else "input[")
    assert not any(word in error["message"] for word in foreign), error["message"]


@pytest.mark.parametrize(("path", "prompt"), [("responses", "input"), ("messages", "messages")])
def test_a_template_that_refuses_names_the_field_of_the_dialect(
    service: Service, engine: ScriptedEngine, path: str, prompt: str
) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "strict")
    strict = TestClient(make_app(replace(service, dialect=replace(service.dialect, template=template))))
    body = {"input": "x"} if path == "responses" else {"messages": [USER], "max_tokens": 9}
    error = strict.post(f"/v1/{path}", json={"model": GLM} | body).json()["error"]
    assert error["param"] == prompt
