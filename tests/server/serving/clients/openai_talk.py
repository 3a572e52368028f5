"""openai-python. It knows no `reasoning`: the thought is among the extra fields of a message."""

import json
from typing import Any

import openai

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


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, messages: list[Any], **fields: Any) -> Any:
    with connect(url) as api:
        given: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS} | fields
        return api.chat.completions.create(model=MODEL, messages=messages, **given)


def chat(url: str) -> Any:
    answer = ask(url, [user(SUM)], reasoning_effort="high", logprobs=True, top_logprobs=NUM_TOP)
    [choice] = answer.choices
    scores = choice.logprobs.content
    usage = answer.usage
    return {
        "text": choice.message.content,
        "tokens": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
        "thought": choice.message.reasoning,
        "scored": [byte for score in scores for byte in score.bytes],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def stream(url: str) -> Any:
    with connect(url) as api:
        events = api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": SUM}], temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(events)
    usage = chunks[-1].usage
    assert usage
    return {
        "text": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
        "tokens": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    }


def tools(url: str) -> Any:
    messages = [user(TWO_CITIES)]
    message = ask(url, messages, tools=[TOOL]).choices[0].message
    calls = [json.loads(call.function.arguments) for call in message.tool_calls]
    messages.append(message.to_dict())
    for call, arguments in zip(message.tool_calls, calls, strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": weather(**arguments)})
    return {"calls": calls, "text": ask(url, messages, tools=[TOOL]).choices[0].message.content}


def no_thought(url: str) -> Any:
    message = ask(url, [user(SUM)], reasoning_effort="none").choices[0].message
    return getattr(message, "reasoning", None)


def json_schema(url: str) -> Any:
    return json.loads(ask(url, [user("A city.")], response_format=FORMAT).choices[0].message.content)


def error(url: str) -> Any:
    return message_of(lambda: ask(url, [user(SUM)], temperature=3))


def cancel(url: str) -> Any:
    with connect(url) as api:
        events = api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": SUM}], stream=True
        )
        name = next(events).id
        events.close()
    return name


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
