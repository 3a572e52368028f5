"""langchain-openai. Its chat model drops what OpenAI does not have, the thought among it."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

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


def connect(url: str, **fields: Any) -> Any:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS, "stream_usage": True} | fields
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, **given)


def chat(url: str) -> Any:
    message = connect(url, logprobs=True, top_logprobs=NUM_TOP, reasoning_effort="high").invoke(SUM)
    scores = message.response_metadata["logprobs"]["content"]
    return _heard(message) | {
        "scored": [byte for score in scores for byte in score["bytes"]],
        "logprobs": [score["logprob"] for score in scores],
        "num_top": [len(score["top_logprobs"]) for score in scores],
    }


def stream(url: str) -> Any:
    chunks = list(connect(url).stream(SUM))
    return _heard(sum(chunks[1:], chunks[0]))


def _heard(message: Any) -> dict[str, Any]:
    used = message.usage_metadata
    return {
        "text": message.text,
        "tokens": [used["input_tokens"], used["output_tokens"], used["total_tokens"]],
    }


def tools(url: str) -> Any:
    model = connect(url).bind_tools([TOOL])
    messages: list[Any] = [HumanMessage(TWO_CITIES)]
    messages.append(model.invoke(messages))
    calls = messages[1].tool_calls
    messages += [ToolMessage(weather(**call["args"]), tool_call_id=call["id"]) for call in calls]
    return {"calls": [call["args"] for call in calls], "text": model.invoke(messages).text}


def json_schema(url: str) -> Any:
    return connect(url).with_structured_output(SCHEMA, method="json_schema").invoke("A city.")


def error(url: str) -> Any:
    return message_of(lambda: connect(url, temperature=3).invoke(SUM))


def cancel(url: str) -> Any:
    """It gives the answer a name of its own, but passes the headers on."""
    chunks = connect(url, include_response_headers=True).stream(SUM)
    name = next(chunks).response_metadata["headers"]["x-generation-id"]
    chunks.close()
    return name


if __name__ == "__main__":
    main(chat, stream, tools, json_schema, error, cancel)
