"""OpenRouter's Python SDK, both lines of it: 1.x, and 0.11, to which langchain-openrouter pins it."""

import json
from typing import Any

import openrouter

from tests.server.serving.clients.common import (
    FORMAT,
    MAX_TOKENS,
    MODEL,
    NUM_TOP,
    SUM,
    TOOL,
    TWO_CITIES,
    main,
    message_of,
    user,
    weather,
)


def connect(url: str) -> openrouter.OpenRouter:
    return openrouter.OpenRouter(
        api_key="sk-or-none", server_url=f"{url}/api/v1", retry_config=None, timeout_ms=120_000
    )


def ask(url: str, messages: Any, **fields: Any) -> Any:
    with connect(url) as api:
        given: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS} | fields
        return api.chat.send(model=MODEL, messages=messages, stream=False, **given)


def chat(url: str) -> Any:
    answer = ask(url, [user(SUM)], reasoning={"effort": "high"}, logprobs=True, top_logprobs=NUM_TOP)
    [choice] = answer.choices
    scores = choice.logprobs.content
    return {
        "text": choice.message.content,
        "tokens": _tokens(answer.usage),
        "thought": choice.message.reasoning,
        "scored": [int(byte) for score in scores for byte in score.bytes_],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def stream(url: str) -> Any:
    messages: Any = [user(SUM)]
    with (
        connect(url) as api,
        api.chat.send(model=MODEL, messages=messages, temperature=0, stream=True) as events,
    ):
        chunks = list(events)
    return {
        "text": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
        "tokens": _tokens(chunks[-1].usage),
    }


def _tokens(usage: Any) -> list[int]:
    return [int(usage.prompt_tokens), int(usage.completion_tokens), int(usage.total_tokens)]


def tools(url: str) -> Any:
    messages = [user(TWO_CITIES)]
    message = ask(url, messages, tools=[TOOL]).choices[0].message
    calls = [json.loads(call.function.arguments) for call in message.tool_calls]
    messages.append(message.model_dump(exclude_none=True))
    for call, arguments in zip(message.tool_calls, calls, strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": weather(**arguments)})
    return {"calls": calls, "text": ask(url, messages, tools=[TOOL]).choices[0].message.content}


def no_thought(url: str) -> Any:
    message = ask(url, [user(SUM)], reasoning={"effort": "none"}).choices[0].message
    return message.model_dump().get("reasoning")


def json_schema(url: str) -> Any:
    return json.loads(ask(url, [user("A city.")], response_format=FORMAT).choices[0].message.content)


def error(url: str) -> Any:
    return message_of(lambda: ask(url, [user(SUM)], temperature=3))


def cancel(url: str) -> Any:
    messages: Any = [user(SUM)]
    with connect(url) as api, api.chat.send(model=MODEL, messages=messages, stream=True) as events:
        return next(iter(events)).id


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
