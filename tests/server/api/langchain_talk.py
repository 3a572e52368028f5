"""Run by test_langchain.py with the Python of an environment of its own: langchain-openrouter pins the
openrouter SDK below 1.0, which does not go into one environment with the newer line.

    python langchain_talk.py URL     talks to the server there, and prints what it heard as JSON
"""

import json
import sys
from typing import Any

import openrouter
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openrouter import ChatOpenRouter

GLM = "z-ai/glm-5.2"
HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {"title": "City", "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def tell_weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return f"{city.strip()}: {days} C"


weather: Any = tool("weather")(tell_weather)


def chain(url: str, **fields: Any) -> ChatOpenRouter:
    return ChatOpenRouter(model=GLM, base_url=f"{url}/api/v1", api_key="sk-or-none", max_retries=0, **fields)


def langchain(url: str) -> dict[str, Any]:
    model = chain(url, reasoning={"effort": "high"})
    answer = model.invoke("hello")
    chunks: list[Any] = list(model.stream("hello"))
    streamed = sum(chunks[1:], chunks[0])
    with_tools = model.bind_tools([weather])
    messages: list[Any] = [HumanMessage("weather?")]
    messages.append(with_tools.invoke(messages))
    messages += [weather.invoke(call) for call in messages[1].tool_calls]
    last = with_tools.invoke(messages)
    parts: list[AIMessageChunk] = list(with_tools.stream("weather?"))
    scored = model.bind(logprobs=True, top_logprobs=2).invoke("hello")
    return {
        "text": answer.content,
        "thought": answer.additional_kwargs["reasoning_content"],
        "tokens": answer.usage_metadata,
        "streamed": streamed.content,
        "streamed_thought": streamed.additional_kwargs["reasoning_content"],
        "calls": [call["args"] for call in messages[1].tool_calls],
        "last": last.content,
        "streamed_calls": [call["args"] for call in sum(parts[1:], parts[0]).tool_calls],
        "logprobs": len(scored.response_metadata["logprobs"]["content"]),
        "parsed": model.with_structured_output(SCHEMA, method="json_schema").invoke("a city"),
        "error": error_of(lambda: chain(url).bind(temperature=3).invoke("hello")),
    }


def sdk(url: str) -> dict[str, Any]:
    with openrouter.OpenRouter(api_key="sk-or-none", server_url=f"{url}/api/v1", retry_config=None) as api:
        answer = api.chat.send(model=GLM, messages=HELLO, stream=False)
        with api.chat.send(model=GLM, messages=HELLO, stream=True) as events:
            chunks = list(events)
        error = error_of(lambda: api.chat.send(model="openai/gpt-9", messages=HELLO, stream=False))
        models = [model.id for model in api.models.list().result.data]
        with api.chat.send(model=GLM, messages=HELLO, stream=True) as events:
            next(iter(events))  # and hang up
        return {
            "text": answer.choices[0].message.content,
            "streamed": "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices),
            "usage": bool(chunks[-1].usage),
            "models": models,
            "error": error,
        }


def error_of(ask: Any) -> str:
    try:
        ask()
    except Exception as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps({"langchain": langchain(sys.argv[1]), "sdk": sdk(sys.argv[1])}, default=str))
