"""pydantic-ai's OpenRouter model, unmodified but for its client's URL."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine
from tests.server.api.test_socket import until

pydantic_ai = pytest.importorskip("pydantic_ai")
from pydantic_ai import Agent, NativeOutput  # noqa: E402
from pydantic_ai.exceptions import ModelHTTPError  # noqa: E402
from pydantic_ai.messages import ModelResponse, TextPart, ThinkingPart  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModelSettings  # noqa: E402
from pydantic_ai.models.openrouter import OpenRouterModel, OpenRouterModelSettings  # noqa: E402
from pydantic_ai.profiles import ModelProfile  # noqa: E402
from pydantic_ai.providers.openrouter import OpenRouterProvider  # noqa: E402

CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>{}</arg_value></tool_call>"
OSLO, BERGEN = CALL.format("Oslo"), CALL.format("Bergen")

Talk = Callable[[OpenRouterModel], Coroutine[Any, Any, Any]]


class City(BaseModel):
    name: str


@pytest.fixture
def says(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., None]:
    def say(*turns: str) -> None:
        engine.turns = [tokenizer.encode(turn) for turn in turns]

    return say


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[OpenRouterModel]:
    async with openai.AsyncOpenAI(base_url=f"{url}/api/v1", api_key="none", max_retries=0) as api:
        yield OpenRouterModel("z-ai/glm-5.2", provider=OpenRouterProvider(openai_client=api))


def run(url: str, talk: Talk) -> Any:
    async def main() -> Any:
        async with opened(url) as model:
            return await talk(model)

    return asyncio.run(main())


@pytest.mark.parametrize("is_streaming", [False, True])
def test_an_agent_calls_tools_side_by_side_and_answers(
    base_url: str,
    says: Callable[..., None],
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    is_streaming: bool,
) -> None:
    says(f"ask</think>{OSLO}{BERGEN}<|observation|>", "told</think>It is 4 C.<|user|>")
    cities: list[str] = []

    def weather(city: str) -> str:
        cities.append(city)
        return "4 C"

    async def talk(model: OpenRouterModel) -> str:
        agent = Agent(model, tools=[weather])
        if not is_streaming:
            return str((await agent.run("weather in Oslo?")).output)
        async with agent.run_stream("weather in Oslo?") as result:
            return str(await result.get_output())

    assert run(base_url, talk) == "It is 4 C."
    assert sorted(cities) == ["Bergen", "Oslo"]
    prompt = tokenizer.decode(engine.requests[-1].token_ids)
    assert "<think>ask</think>" + OSLO + BERGEN in prompt, "its thought comes back with the calls"


def test_a_thought_and_its_tokens_are_told_apart(base_url: str, engine: ScriptedEngine) -> None:
    settings = OpenRouterModelSettings(openrouter_reasoning={"effort": "high"})

    async def talk(model: OpenRouterModel) -> Any:
        return await Agent(model, model_settings=settings).run("hello")

    result = run(base_url, talk)
    response = result.all_messages()[-1]
    assert isinstance(response, ModelResponse)
    assert [part.content for part in response.parts if isinstance(part, ThinkingPart)] == ["hm"]
    assert [part.content for part in response.parts if isinstance(part, TextPart)] == ["Hi Ærø 👋!"]
    assert result.usage.input_tokens == len(engine.requests[0].token_ids)
    assert result.usage.output_tokens == len(engine.script)


def test_an_output_type_becomes_a_schema(
    base_url: str, says: Callable[..., None], engine: ScriptedEngine
) -> None:
    says('</think>{"name": "Oslo"}<|user|>')

    async def talk(model: OpenRouterModel) -> Any:
        # its own list of models has none of Z.ai's that can
        able = OpenRouterModel(
            model.model_name, provider=model._provider, profile=ModelProfile(supports_json_schema_output=True)
        )
        return (await Agent(able, output_type=NativeOutput(City)).run("a city")).output

    assert run(base_url, talk) == City(name="Oslo")
    assert '"name"' in engine.requests[0].grammar


def test_log_probabilities_are_read(base_url: str) -> None:
    settings = OpenAIChatModelSettings(openai_logprobs=True, openai_top_logprobs=2)

    async def talk(model: OpenRouterModel) -> Any:
        return (await Agent(model, model_settings=settings).run("hello")).all_messages()[-1]

    details = run(base_url, talk).provider_details
    assert b"".join(bytes(score["bytes"]) for score in details["logprobs"]).decode() == "Hi Ærø 👋!"


def test_errors_say_what_is_wrong(base_url: str) -> None:
    async def talk(model: OpenRouterModel) -> Any:
        return await Agent(model, model_settings=OpenRouterModelSettings(temperature=3)).run("hello")

    with pytest.raises(ModelHTTPError, match="temperature") as caught:
        run(base_url, talk)
    assert caught.value.status_code == 400


def test_leaving_a_stream_cancels_it(base_url: str, engine: ScriptedEngine) -> None:
    engine.token_s = 0.05

    async def talk(model: OpenRouterModel) -> None:
        async with Agent(model).run_stream("hello") as result:
            async for _ in result.stream_text():
                raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(base_url, talk)
    until(lambda: engine.cancelled)
