"""langchain-openrouter, over the 0.11 line of OpenRouter's SDK."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openrouter import ChatOpenRouter

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
)


def connect(url: str, **fields: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS} | fields
    return ChatOpenRouter(
        model=MODEL, base_url=f"{url}/api/v1", api_key="sk-or-none", max_retries=0, timeout=120_000, **given
    )


def chat(url: str) -> Any:
    model = connect(url, reasoning={"effort": "high"}).bind(logprobs=True, top_logprobs=NUM_TOP)
    message = model.invoke(SUM)
    scores = message.response_metadata["logprobs"]["content"]
    return _heard(message) | {
        "thought": message.additional_kwargs["reasoning_content"],
        "scored": [int(byte) for score in scores for byte in score["bytes"]],
        "logprobs": [score["logprob"] for score in scores],
        "num_top": [len(score["top_logprobs"]) for score in scores],
    }


def stream(url: str) -> Any:
    chunks = list(connect(url).stream(SUM))
    return _heard(sum(chunks[1:], chunks[0]))


def _heard(message: Any) -> dict[str, Any]:
    used = message.usage_metadata
    return {
        "text": message.content,
        "tokens": [used["input_tokens"], used["output_tokens"], used["total_tokens"]],
    }


def tools(url: str) -> Any:
    model = connect(url).bind_tools([TOOL])
    messages: list[Any] = [HumanMessage(TWO_CITIES)]
    messages.append(model.invoke(messages))
    calls = messages[1].tool_calls
    messages += [ToolMessage(weather(**call["args"]), tool_call_id=call["id"]) for call in calls]
    return {"calls": [call["args"] for call in calls], "text": model.invoke(messages).content}


def no_thought(url: str) -> Any:
    message = connect(url, reasoning={"effort": "none"}).invoke(SUM)
    return message.additional_kwargs.get("reasoning_content")


def json_schema(url: str) -> Any:
    return connect(url).with_structured_output(SCHEMA, method="json_schema").invoke("A city.")


def error(url: str) -> Any:
    return message_of(lambda: connect(url).bind(temperature=3).invoke(SUM))


def cancel(url: str) -> Any:
    """It tells the answer's id only at its end, but the headers have it."""
    model, names = connect(url), []
    hooks = model.client.sdk_configuration.client.event_hooks["response"]
    hooks.append(lambda response: names.append(response.headers["x-generation-id"]))
    chunks = model.stream(SUM)
    next(chunks)
    chunks.close()
    return names[0]


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
