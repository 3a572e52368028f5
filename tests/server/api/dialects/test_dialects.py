"""The same conversation is the same tokens in every dialect, so all of them share one prefix cache."""

from typing import Any

from starlette.testclient import TestClient

from tests.server.api.scripted import ScriptedEngine

GLM = "z-ai/glm-5.2"
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
    prompts = {request.token_ids for request in engine.requests}
    assert len(engine.requests) == 9
    assert len(prompts) == 1
    counted = client.post(
        "/v1/messages/count_tokens", json={"model": GLM} | messages() | {"max_tokens": None}
    )
    assert counted.json() == {"input_tokens": len(engine.requests[0].token_ids)}, counted.text
