"""pydantic-ai's OpenRouter model; its provider has a fixed URL, so the client inside gets ours."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

import openai
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, Tool
from pydantic_ai.messages import ModelResponse, ThinkingPart, ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModelSettings
from pydantic_ai.models.openrouter import OpenRouterModel, OpenRouterModelSettings
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.openrouter import OpenRouterProvider

from tests.server.serving.clients.common import (
    MAX_TOKENS,
    MODEL,
    NUM_TOP,
    SUM,
    TOOL,
    TWO_CITIES,
    main,
    message_of,
    weather,
)

FUNCTION = TOOL["function"]
GET_WEATHER: Any = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "json_schema": FUNCTION["parameters"],
}
Talk = Callable[[OpenRouterModel], Coroutine[Any, Any, Any]]


class Answer(BaseModel):
    """What a structured answer holds."""

    city: Literal["Oslo", "Rome"]
    is_sunny: bool


def run(url: str, talk: Talk) -> Any:
    async def connected() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/api/v1", api_key="none", max_retries=0) as api:
            # its own list of models has none of Z.ai's that can hold to a schema
            able = ModelProfile(supports_json_schema_output=True)
            model = OpenRouterModel(MODEL, provider=OpenRouterProvider(openai_client=api), profile=able)
            return await talk(model)

    return asyncio.run(connected())


def ask(url: str, question: str, settings: Any = None, **fields: Any) -> Any:
    given: Any = {"temperature": 0, "max_tokens": MAX_TOKENS} | (settings or {})

    async def talk(model: OpenRouterModel) -> Any:
        return await Agent(model, model_settings=given, **fields).run(question)

    return run(url, talk)


def chat(url: str) -> Any:
    thinking = OpenRouterModelSettings(openrouter_reasoning={"effort": "high"})
    scoring = OpenAIChatModelSettings(openai_logprobs=True, openai_top_logprobs=NUM_TOP)
    result = ask(url, SUM, {**thinking, **scoring})
    scores = result.all_messages()[-1].provider_details["logprobs"]
    return {
        "text": result.output,
        "thought": "".join(part.content for part in _parts(result, ThinkingPart)),
        "scored": [byte for score in scores for byte in score["bytes"]],
        "logprobs": [score["logprob"] for score in scores],
        "num_top": [len(score["top_logprobs"]) for score in scores],
    } | _tokens(result.usage)


def stream(url: str) -> Any:
    async def talk(model: OpenRouterModel) -> Any:
        async with Agent(model, model_settings={"temperature": 0}).run_stream(SUM) as result:
            return {"text": await result.get_output()} | _tokens(result.usage)

    return run(url, talk)


def _tokens(usage: Any) -> dict[str, Any]:
    return {"tokens": [usage.input_tokens, usage.output_tokens, usage.total_tokens]}


def _parts(result: Any, kind: type) -> list[Any]:
    responses = [message for message in result.all_messages() if isinstance(message, ModelResponse)]
    return [part for response in responses for part in response.parts if isinstance(part, kind)]


def tools(url: str) -> Any:
    result = ask(url, TWO_CITIES, tools=[Tool.from_schema(weather, **GET_WEATHER)])
    return {"calls": [part.args_as_dict() for part in _parts(result, ToolCallPart)], "text": result.output}


def no_thought(url: str) -> Any:
    settings = OpenRouterModelSettings(openrouter_reasoning={"effort": "none"})
    return "".join(part.content for part in _parts(ask(url, SUM, settings), ThinkingPart)) or None


def json_schema(url: str) -> Any:
    return ask(url, "A city.", output_type=NativeOutput(Answer)).output.model_dump()


def error(url: str) -> Any:
    return message_of(lambda: ask(url, SUM, {"temperature": 3}))


def cancel(url: str) -> Any:
    heard: list[str | None] = []

    async def talk(model: OpenRouterModel) -> None:
        async with Agent(model).run_stream(SUM) as result:
            async for response in result.stream_response():
                heard.append(response.provider_response_id)
                raise asyncio.CancelledError

    with suppress(asyncio.CancelledError):
        run(url, talk)
    return heard[0]


if __name__ == "__main__":
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
