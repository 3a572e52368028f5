"""Anthropic's Python SDK, over /v1/messages. It has no log-probabilities."""

import json
from typing import Any

import anthropic

from tests.server.serving.clients.common import (
    MAX_TOKENS,
    MODEL,
    SCHEMA,
    SUM,
    TOOL,
    TWO_CITIES,
    main,
    message_of,
    user,
    weather,
)  # fmt: skip

FUNCTION = TOOL["function"]
TOOLS: Any = [
    {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
]
THINKS: dict[str, Any] = {"thinking": {"type": "adaptive"}}


def connect(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def ask(url: str, messages: list[Any], temperature: float = 0, **fields: Any) -> Any:
    """The SDK has no parameter for the temperature any more, but the server has."""
    extra = {"temperature": temperature}
    with connect(url) as api:
        return api.messages.create(
            model=MODEL, messages=messages, max_tokens=MAX_TOKENS, extra_body=extra, **fields
        )


def _heard(message: Any) -> dict[str, Any]:
    usage = message.usage
    num_prompt = usage.input_tokens + usage.cache_read_input_tokens
    return {
        "text": "".join(block.text for block in message.content if block.type == "text"),
        "tokens": [num_prompt, usage.output_tokens, num_prompt + usage.output_tokens],
        "thought": "".join(block.thinking for block in message.content if block.type == "thinking"),
    }


def chat(url: str) -> Any:
    return _heard(ask(url, [user(SUM)], **THINKS))


def stream(url: str) -> Any:
    with (
        connect(url) as api,
        api.messages.stream(
            model=MODEL, messages=[{"role": "user", "content": SUM}], max_tokens=MAX_TOKENS,
            extra_body={"temperature": 0}, **THINKS,
        ) as events,
    ):  # fmt: skip
        text = "".join(events.text_stream)
        final = _heard(events.get_final_message())
    assert final["text"] == text
    return final


def tools(url: str) -> Any:
    messages = [user(TWO_CITIES)]
    message = ask(url, messages, tools=TOOLS)
    calls = [block for block in message.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)} for call in calls
    ]
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    return {
        "calls": [call.input for call in calls],
        "text": _heard(ask(url, messages, tools=TOOLS))["text"],
    }


def no_thought(url: str) -> Any:
    return _heard(ask(url, [user(SUM)], thinking={"type": "disabled"}))["thought"] or None


def json_schema(url: str) -> Any:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    return json.loads(_heard(ask(url, [user("A city.")], output_config=config))["text"])


def error(url: str) -> Any:
    return message_of(lambda: ask(url, [user(SUM)], temperature=3))


def cancel(url: str) -> Any:
    with connect(url) as api:
        messages: Any = [user(SUM)]
        events = api.messages.create(model=MODEL, messages=messages, max_tokens=MAX_TOKENS, stream=True)
        name = next(iter(events)).message.id  # type: ignore[union-attr]
        events.close()
    return name.replace("msg_", "gen-")


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
