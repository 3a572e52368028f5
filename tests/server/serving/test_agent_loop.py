"""An agent's loop against Pocket, which really decides to call: the SDKs, unmodified, over a socket."""

import json
from typing import Any

import anthropic
import pytest

from server.commands.checkpoint import POCKET
from tests.server.serving.clients.common import TOOL
from tests.server.serving.running import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]


def take_turn(server: Server, messages: list[Any], is_streaming: bool, **options: Any) -> Any:
    fields: dict[str, Any] = {
        "model": "glmserve/pocket",
        "messages": messages,
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 300,
    }
    with server.openai() as api:
        if not is_streaming:
            return api.chat.completions.create(**fields, **options).choices[0]
        with api.chat.completions.stream(**fields, **options) as events:
            return events.get_final_completion().choices[0]


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_question_a_call_its_result_and_the_answer(server: Server, is_streaming: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    choice = take_turn(server, messages, is_streaming)
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    result = json.dumps({"city": "Oslo", "temperature": 7, "condition": "rain"})
    messages += [
        choice.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ]
    choice = take_turn(server, messages, is_streaming)
    assert choice.finish_reason == "stop"
    assert "7" in choice.message.content
    assert not choice.message.tool_calls


def test_the_other_dialects_ask_the_same_and_get_the_same(server: Server) -> None:
    question, function = "What is the weather in Oslo?", TOOL["function"]
    with server.openai() as api:
        tools: Any = [{"type": "function", **function}]
        with api.responses.stream(
            model="glmserve/pocket", input=question, tools=tools, temperature=0, max_output_tokens=300
        ) as events:
            response = events.get_final_response()
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as claude:
        own: Any = {name: function[name] for name in ("name", "description")}
        with claude.messages.stream(
            model="glmserve/pocket",
            messages=[{"role": "user", "content": question}],
            tools=[own | {"input_schema": function["parameters"]}],
            thinking={"type": "adaptive"},
            max_tokens=300,
            extra_body={"temperature": 0},
        ) as stream:
            message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    call: Any = response.output[-1]
    use: Any = message.content[-1]
    assert (
        (call.name, json.loads(call.arguments)) == (use.name, use.input) == ("get_weather", {"city": "Oslo"})
    )
    thought: Any = response.output[0]
    assert thought.content[0].text == message.content[0].thinking  # type: ignore[union-attr]
    assert response.usage
    cached = message.usage.cache_read_input_tokens or 0
    assert response.usage.input_tokens == message.usage.input_tokens + cached
    assert response.usage.output_tokens == message.usage.output_tokens
