"""openai-python's Responses."""

import json
from typing import Any

import openai

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
SCORED = {"top_logprobs": NUM_TOP, "include": ["message.output_text.logprobs"]}


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, asked: Any, **fields: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_output_tokens": MAX_TOKENS} | fields
    with connect(url) as api:
        return api.responses.create(model=MODEL, input=asked, **given)


def _heard(response: Any) -> dict[str, Any]:
    usage = response.usage
    thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
    return {
        "text": response.output_text,
        "tokens": [usage.input_tokens, usage.output_tokens, usage.total_tokens],
        "thought": "".join(thoughts),
    }


def chat(url: str) -> Any:
    response = ask(url, SUM, reasoning={"effort": "high"}, **SCORED)
    scores = response.output[-1].content[0].logprobs
    return _heard(response) | {
        "scored": [byte for score in scores for byte in score.bytes],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def stream(url: str) -> Any:
    with connect(url) as api, api.responses.stream(model=MODEL, input=SUM, temperature=0) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        final = _heard(events.get_final_response())
    assert final["text"] == text
    return final


def tools(url: str) -> Any:
    asked: list[Any] = [{"role": "user", "content": TWO_CITIES}]
    output = ask(url, asked, tools=TOOLS).output
    calls = [item for item in output if item.type == "function_call"]
    asked += [item.to_dict() for item in output]
    for call in calls:
        said = weather(**json.loads(call.arguments))
        asked.append({"type": "function_call_output", "call_id": call.call_id, "output": said})
    return {
        "calls": [json.loads(call.arguments) for call in calls],
        "text": ask(url, asked, tools=TOOLS).output_text,
    }


def no_thought(url: str) -> Any:
    return _heard(ask(url, SUM, reasoning={"effort": "none"}))["thought"] or None


def json_schema(url: str) -> Any:
    wanted = {"format": {"type": "json_schema", "name": "answer", "strict": True, "schema": SCHEMA}}
    return json.loads(ask(url, "A city.", text=wanted).output_text)


def error(url: str) -> Any:
    return message_of(lambda: ask(url, SUM, temperature=3))


def cancel(url: str) -> Any:
    with connect(url) as api:
        events = api.responses.create(model=MODEL, input=SUM, stream=True)
        name = next(iter(events)).response.id  # type: ignore[union-attr]
        events.close()
    return name.replace("resp_", "gen-")


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
