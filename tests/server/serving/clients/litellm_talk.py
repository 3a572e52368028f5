"""LiteLLM as a library, by its OpenRouter provider."""

import json
from typing import Any

import litellm

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
)  # fmt: skip


def ask(url: str, messages: list[Any], **fields: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS} | fields
    return litellm.completion(
        model=f"openrouter/{MODEL}", api_base=f"{url}/api/v1", api_key="sk-or-none", num_retries=0,
        messages=messages, **given,
    )  # fmt: skip


def _tokens(usage: Any) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


def chat(url: str) -> Any:
    answer = ask(url, [user(SUM)], reasoning_effort="high", logprobs=True, top_logprobs=NUM_TOP)
    [choice] = answer.choices
    scores = choice.logprobs.content
    return {
        "text": choice.message.content,
        "tokens": _tokens(answer.usage),
        "thought": choice.message.reasoning_content,
        "scored": [byte for score in scores for byte in score.bytes],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def stream(url: str) -> Any:
    chunks = list(ask(url, [user(SUM)], stream=True, stream_options={"include_usage": True}))
    [usage] = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    return {
        "text": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
        "tokens": _tokens(usage),
    }


def tools(url: str) -> Any:
    messages = [user(TWO_CITIES)]
    message = ask(url, messages, tools=[TOOL]).choices[0].message
    calls = [json.loads(call.function.arguments) for call in message.tool_calls]
    messages.append(message.model_dump())
    for call, arguments in zip(message.tool_calls, calls, strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": weather(**arguments)})
    return {"calls": calls, "text": ask(url, messages, tools=[TOOL]).choices[0].message.content}


def no_thought(url: str) -> Any:
    message = ask(url, [user(SUM)], reasoning_effort="none").choices[0].message
    return getattr(message, "reasoning_content", None)


def json_schema(url: str) -> Any:
    return json.loads(ask(url, [user("A city.")], response_format=FORMAT).choices[0].message.content)


def error(url: str) -> Any:
    return message_of(lambda: ask(url, [user(SUM)], temperature=3))


def cancel(url: str) -> Any:
    events = ask(url, [user(SUM)], stream=True)
    name = next(events).id
    events.completion_stream.close()
    return name


if __name__ == "__main__":
    litellm.suppress_debug_info = True  # it prints to where the answer is read
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
