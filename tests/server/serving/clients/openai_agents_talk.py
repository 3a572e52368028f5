"""OpenAI's Agents SDK, over Responses: it goes round with tools by itself."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from agents.items import ReasoningItem, ToolCallItem
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel

from tests.server.serving.clients import common
from tests.server.serving.clients.common import MAX_TOKENS, MODEL, NUM_TOP, SUM, TWO_CITIES, main, message_of


class Answer(BaseModel):
    """As the schema of the other talks."""

    city: str
    is_sunny: bool


def get_weather(city: str) -> str:
    """Get the current weather for a city.

    Args:
        city: Name of the city
    """
    return common.weather(city)


def make_agent(api: AsyncOpenAI, **fields: Any) -> Agent[None]:
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, **fields.pop("settings", {})}
    return Agent(
        "talk", model=OpenAIResponsesModel(MODEL, api), model_settings=ModelSettings(**settings), **fields
    )


def ask(url: str, text: str, **fields: Any) -> Any:
    async def run() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            return await Runner.run(make_agent(api, **fields), text)

    return asyncio.run(run())


def _heard(result: Any) -> dict[str, Any]:
    usage = result.context_wrapper.usage
    thoughts = [item.raw_item.content or [] for item in result.new_items if isinstance(item, ReasoningItem)]
    return {
        "text": result.final_output,
        "tokens": [usage.input_tokens, usage.output_tokens, usage.total_tokens],
        "thought": "".join(part.text for parts in thoughts for part in parts),
    }


def chat(url: str) -> Any:
    settings = {
        "reasoning": Reasoning(effort="high"),
        "top_logprobs": NUM_TOP,
    }
    result = ask(url, SUM, settings=settings)
    scores = result.raw_responses[-1].output[-1].content[0].logprobs
    return _heard(result) | {
        "scored": [byte for score in scores for byte in score.bytes],
        "logprobs": [score.logprob for score in scores],
        "num_top": [len(score.top_logprobs) for score in scores],
    }


def _follow(url: str, until: Callable[[Any], bool]) -> Any:
    async def run() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            result = Runner.run_streamed(make_agent(api), SUM)
            async for event in result.stream_events():
                if event.type == "raw_response_event" and until(event.data):
                    result.cancel()
                    break
            return result

    return asyncio.run(run())


def stream(url: str) -> Any:
    texts: list[str] = []

    def listen(event: Any) -> bool:
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
        return False

    final = _heard(_follow(url, listen))
    assert final["text"] == "".join(texts)
    return final


def tools(url: str) -> Any:
    result = ask(url, TWO_CITIES, tools=[function_tool(get_weather)])
    calls = [item.raw_item for item in result.new_items if isinstance(item, ToolCallItem)]
    return {"calls": [json.loads(call.arguments) for call in calls], "text": result.final_output}


def no_thought(url: str) -> Any:
    return _heard(ask(url, SUM, settings={"reasoning": Reasoning(effort="none")}))["thought"] or None


def json_schema(url: str) -> Any:
    return ask(url, "Is it sunny in Oslo?", output_type=Answer).final_output.model_dump()


def error(url: str) -> Any:
    return message_of(lambda: ask(url, SUM, settings={"temperature": 3}))


def cancel(url: str) -> Any:
    names: list[str] = []

    def listen(event: Any) -> bool:
        names.append(event.response.id)
        return True

    _follow(url, listen)
    return names[0].replace("resp_", "gen-")


if __name__ == "__main__":
    set_tracing_disabled(True)
    main(chat, stream, tools, no_thought, json_schema, error, cancel)
