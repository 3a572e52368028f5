"""The Responses of OpenRouter's Python SDK 1.x, and the older name that it keeps for them."""

import json
from typing import Any

import openrouter

from tests.server.serving.clients.common import (
    MAX_TOKENS,
    MODEL,
    NUM_TOP,
    SCHEMA,
    SUM,
    TOOL,
    TWO_CITIES,
    main,
    message_of,
    weather,
)  # fmt: skip

TOOLS: Any = [{"type": "function", **TOOL["function"]}]


def connect(url: str) -> openrouter.OpenRouter:
    return openrouter.OpenRouter(
        api_key="sk-or-none", server_url=f"{url}/api/v1", retry_config=None, timeout_ms=120_000
    )


def ask(url: str, asked: Any, **fields: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_output_tokens": MAX_TOKENS} | fields
    with connect(url) as api:
        return api.beta.responses.send(model=MODEL, input=asked, stream=False, **given)


def _heard(response: Any) -> dict[str, Any]:
    usage, output = response.usage, response.output
    texts = [part.text for item in output if item.type == "message" for part in item.content]
    return {
        "text": "".join(texts),
        "tokens": [int(usage.input_tokens), int(usage.output_tokens), int(usage.total_tokens)],
        "thought": "".join(part.text for item in output if item.type == "reasoning" for part in item.content),
    }


def chat(url: str) -> Any:
    wanted = {"top_logprobs": NUM_TOP, "include": ["message.output_text.logprobs"]}
    response = ask(url, SUM, reasoning={"effort": "high"}, **wanted)
    scores = response.output[-1].content[0].logprobs
    return _heard(response) | {
        "scored": [int(byte) for score in scores for byte in score.bytes_],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def stream(url: str) -> Any:
    with (
        connect(url) as api,
        api.responses.send(model=MODEL, input=SUM, temperature=0, stream=True) as events,
    ):
        heard = list(events)
    text = "".join(event.delta for event in heard if event.type == "response.output_text.delta")
    final = _heard(heard[-1].response)
    assert final["text"] == text
    return final


def tools(url: str) -> Any:
    asked: list[Any] = [{"role": "user", "content": TWO_CITIES}]
    output = ask(url, asked, tools=TOOLS).output
    calls = [item for item in output if item.type == "function_call"]
    asked += [item.model_dump(exclude_none=True) for item in output]
    for call in calls:
        said = weather(**json.loads(call.arguments))
        asked.append({"type": "function_call_output", "call_id": call.call_id, "output": said})
    return {
        "calls": [json.loads(call.arguments) for call in calls],
        "text": _heard(ask(url, asked, tools=TOOLS))["text"],
    }


def no_thought(url: str) -> Any:
    return _heard(ask(url, SUM, reasoning={"effort": "none"}))["thought"] or None


def json_schema(url: str) -> Any:
    wanted = {"format": {"type": "json_schema", "name": "answer", "strict": True, "schema": SCHEMA}}
    return json.loads(_heard(ask(url, "A city.", text=wanted))["text"])


def error(url: str) -> Any:
    return message_of(lambda: ask(url, SUM, temperature=3))


def cancel(url: str) -> Any:
    with connect(url) as api, api.responses.send(model=MODEL, input=SUM, stream=True) as events:
        name: str = next(iter(events)).response.id
    return name.replace("resp_", "gen-")


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
