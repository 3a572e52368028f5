"""pydantic-ai's OpenRouter model, unmodified but for its client's URL."""

import asyncio

import openai
import pytest

from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine

pydantic_ai = pytest.importorskip("pydantic_ai")
from pydantic_ai.models.openrouter import OpenRouterModel  # noqa: E402
from pydantic_ai.providers.openrouter import OpenRouterProvider  # noqa: E402

CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"


@pytest.mark.parametrize("is_streaming", [False, True])
def test_an_agent_calls_a_tool_and_answers(
    base_url: str, engine: ScriptedEngine, tokenizer: Tokenizer, is_streaming: bool
) -> None:
    turns = (f"ask</think>{CALL}<|observation|>", "told</think>It is 4 C.<|user|>")
    engine.turns = [tokenizer.encode(turn) for turn in turns]
    cities: list[str] = []

    def weather(city: str) -> str:
        cities.append(city)
        return "4 C"

    async def talk() -> str:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/api/v1", api_key="none", max_retries=0) as api:
            model = OpenRouterModel("z-ai/glm-5.2", provider=OpenRouterProvider(openai_client=api))
            agent = pydantic_ai.Agent(model, tools=[weather])
            if not is_streaming:
                return str((await agent.run("weather in Oslo?")).output)
            async with agent.run_stream("weather in Oslo?") as result:
                return str(await result.get_output())

    assert asyncio.run(talk()) == "It is 4 C."
    assert cities == ["Oslo"]
    prompt = tokenizer.decode(engine.requests[-1].token_ids)
    assert "<think>ask</think>" + CALL in prompt, "its thought comes back with the call"
