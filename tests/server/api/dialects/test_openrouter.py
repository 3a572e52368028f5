"""OpenRouter's own SDK, unmodified but for its URL, and what that surface promises."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openrouter
import pytest
from openrouter import errors
from starlette.testclient import TestClient

from server.api.request.model_names import ModelNames
from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import BERGEN, OSLO, TOOLS, joined_calls
from tests.server.api.dialects.test_chat import ask, joined, stream
from tests.server.api.scripted import ScriptedEngine
from tests.server.api.test_socket import until

GLM = "z-ai/glm-5.2"
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def sdk(base_url: str) -> Iterator[openrouter.OpenRouter]:
    with openrouter.OpenRouter(
        api_key="sk-or-none", server_url=f"{base_url}/api/v1", retry_config=None
    ) as sdk:
        yield sdk


@pytest.fixture
def says(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., None]:
    def say(*turns: str) -> None:
        engine.turns = [tokenizer.encode(turn) for turn in turns]

    return say


def test_the_sdk_chats(sdk: openrouter.OpenRouter) -> None:
    answer = sdk.chat.send(model=GLM, messages=HELLO, reasoning={"effort": "high"}, stream=False)
    [choice] = answer.choices
    assert (choice.message.content, choice.message.reasoning) == ("Hi Ærø 👋!", "hm")
    assert choice.finish_reason == "stop"
    assert answer.usage
    assert answer.usage.model_dump()["completion_tokens_details"]["reasoning_tokens"] == 2


def test_the_sdk_streams(sdk: openrouter.OpenRouter) -> None:
    with sdk.chat.send(model=GLM, messages=HELLO, stream=True) as events:
        chunks = list(events)
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "Hi Ærø 👋!"
    assert "".join(c.delta.reasoning or "" for chunk in chunks for c in chunk.choices) == "hm"
    assert chunks[-1].usage


def test_the_sdk_goes_round_with_parallel_tools(
    sdk: openrouter.OpenRouter, says: Callable[..., None]
) -> None:
    says(f"ask</think>{OSLO}{BERGEN}<|observation|>", "told</think>4 C.<|user|>")
    tools: Any = TOOLS
    answer = sdk.chat.send(model=GLM, messages=HELLO, tools=tools, stream=False)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in message.tool_calls or []] == ["weather", "weather"]
    messages: Any = [*HELLO, message.model_dump(exclude_none=True)]
    for call in message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "4 C"})
    answer = sdk.chat.send(model=GLM, messages=messages, tools=tools, stream=False)
    assert answer.choices[0].message.content == "4 C."


def test_the_sdk_streams_tool_calls(sdk: openrouter.OpenRouter, says: Callable[..., None]) -> None:
    says(f"</think>{OSLO}<|observation|>")
    tools: Any = TOOLS
    with sdk.chat.send(model=GLM, messages=HELLO, tools=tools, stream=True) as events:
        parts = [part for chunk in events for c in chunk.choices for part in c.delta.tool_calls or []]
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert arguments == '{"city": " Oslo\\n", "days": 2}'


def test_the_sdk_reads_log_probabilities(sdk: openrouter.OpenRouter) -> None:
    answer = sdk.chat.send(model=GLM, messages=HELLO, logprobs=True, top_logprobs=2, stream=False)
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.content


def test_the_sdk_asks_for_a_schema(
    sdk: openrouter.OpenRouter, says: Callable[..., None], engine: ScriptedEngine
) -> None:
    says('</think>{"name": "Oslo"}<|user|>')
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    answer = sdk.chat.send(model=GLM, messages=HELLO, response_format=format_, stream=False)
    assert answer.choices[0].message.content == '{"name": "Oslo"}'
    assert '"name"' in engine.requests[0].grammar


def test_the_sdk_hangs_up(sdk: openrouter.OpenRouter, engine: ScriptedEngine) -> None:
    engine.token_s = 0.05
    with sdk.chat.send(model=GLM, messages=HELLO, stream=True) as events:
        next(iter(events))
    until(lambda: engine.cancelled)


def test_the_sdk_raises_what_the_server_says(sdk: openrouter.OpenRouter, engine: ScriptedEngine) -> None:
    with pytest.raises(errors.BadRequestResponseError, match="gpt-9 is not a valid model ID"):
        sdk.chat.send(model="openai/gpt-9", messages=HELLO, stream=False)
    engine.fails_after = 1
    with sdk.chat.send(model=GLM, messages=HELLO, stream=True) as events:
        chunks = list(events)
    assert chunks[-1].error
    assert chunks[-1].error.code == 502
    assert chunks[-1].choices[0].finish_reason == "error"


# the SDK warns about deprecated fields of its own answers
@pytest.mark.filterwarnings("ignore:warning. .. DEPRECATED:DeprecationWarning")
@pytest.mark.slow
def test_the_sdk_reads_every_page_about_the_server(sdk: openrouter.OpenRouter) -> None:
    answer = sdk.chat.send(model=GLM, messages=HELLO, session_id="agent-7", stream=False)
    listed = sdk.models.list()
    assert listed
    assert [model.id for model in listed.result.data] == [GLM]
    assert sdk.models.count().data.count == 1
    assert sdk.models.get(author="z-ai", slug="glm-5.2").data.id == GLM
    assert sdk.endpoints.list(author="z-ai", slug="glm-5.2").data.endpoints[0].context_length == 4096
    assert sdk.api_keys.get_current_key_metadata().data.label == "local"
    assert sdk.credits.get_credits().data.total_usage == 0
    assert [provider.name for provider in sdk.providers.list().data] == ["glmserve"]
    generation = sdk.generations.get_generation(id=answer.id).data
    assert (generation.session_id, generation.finish_reason) == ("agent-7", "stop")
    assert answer.usage
    assert generation.tokens_prompt == answer.usage.prompt_tokens
    assert generation.native_tokens_reasoning == 2


def test_hanging_up_is_written_down(base_url: str, engine: ScriptedEngine) -> None:
    engine.token_s = 0.05
    url = f"{base_url}/api/v1/chat/completions"
    with httpx.stream("POST", url, json={"messages": HELLO, "stream": True}) as response:
        name = response.headers["x-generation-id"]
        next(response.iter_lines())
    for _ in range(100):
        found = httpx.get(f"{base_url}/api/v1/generation", params={"id": name})
        if found.status_code == 200:
            break
    assert found.json()["data"]["cancelled"] is True


@pytest.mark.parametrize(
    "name",
    [
        GLM,
        "z-ai/glm-5.2:nitro",
        "z-ai/glm-5.2:exacto",
        "openrouter/z-ai/glm-5.2",
        "glm-5.2",
        "zai-org/GLM-5.2",
        "GLM-5.2",
        "z-ai/glm-5.2-20260616",
        "z-ai/glm-5.2-2026-06-16:free",
    ],
)
def test_the_model_is_known_by_all_of_its_names(client: TestClient, name: str) -> None:
    assert ask(client, model=name)["model"] == GLM
    assert ask(client, model="openai/gpt-9", models=["anthropic/x", name])["model"] == GLM


@pytest.mark.parametrize("name", ["z-ai/glm-5", "z-ai/glm-5.2-air", "openai/glm-5.2", "", "gpt-9", ":nitro"])
def test_another_model_is_refused_unless_the_policy_is_any(client: TestClient, name: str) -> None:
    response = client.post("/api/v1/chat/completions", json={"messages": HELLO, "model": name})
    assert response.status_code == response.json()["error"]["code"] == 400
    assert "is not a valid model ID" in response.json()["error"]["message"]
    ModelNames(GLM, "any").check(name, [])


def test_pocket_does_not_answer_to_the_name_of_the_real_model() -> None:
    assert not ModelNames("glmserve/pocket").means_us(GLM)


def test_several_answers_come_each_with_its_index(client: TestClient, engine: ScriptedEngine) -> None:
    result = ask(client, n=3, seed=7)
    assert [choice["index"] for choice in result["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in result["choices"]} == {"Hi Ærø 👋!"}
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]
    assert len({request.request_id for request in engine.requests}) == 3
    assert result["usage"]["completion_tokens"] == 3 * len(engine.script)
    assert result["usage"]["prompt_tokens"] == len(engine.requests[0].token_ids)

    receipt = client.get("/api/v1/generation", params={"id": result["id"]}).json()["data"]
    assert receipt["tokens_prompt"] == result["usage"]["prompt_tokens"], "the prompt was read once"
    assert receipt["tokens_completion"] == result["usage"]["completion_tokens"]

    chunks = stream(client, n=2)
    for index in (0, 1):
        own = [
            {"choices": [choice for choice in chunk["choices"] if choice["index"] == index]}
            for chunk in chunks
        ]
        assert joined(own, "content") == "Hi Ærø 👋!"
        reasons = [choice["finish_reason"] for chunk in own for choice in chunk["choices"]]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_several_answers_fail_together(client: TestClient, engine: ScriptedEngine) -> None:
    engine.fails_after = 2
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "n": 2})
    assert response.status_code == 502


def test_several_completions_for_each_prompt(client: TestClient) -> None:
    body = {"prompt": ["a", "bc"], "n": 2, "max_tokens": 1, "echo": True}
    result = client.post("/v1/completions", json=body).json()
    choices = result["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in choices] == ["a", "a", "b", "b"]
    receipt = client.get("/api/v1/generation", params={"id": result["id"]}).json()["data"]
    assert receipt["tokens_prompt"] == result["usage"]["prompt_tokens"] == 3


def test_the_limit_of_a_thought_reaches_the_engine(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    ask(client, reasoning={"max_tokens": 5})
    ask(client)
    ask(client, reasoning={"enabled": False, "max_tokens": 5})
    thoughts = [request.thought for request in engine.requests]
    assert [thought and thought.max_tokens for thought in thoughts] == [5, None, None]
    assert thoughts[0]
    assert thoughts[0].end_token_id == tokenizer.end_think_id
    assert thoughts[2] is None


def test_a_change_of_effort_in_a_system_message_is_heard(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    update = {"role": "system", "content": "", "configuration_update": {"reasoning": {"effort": "low"}}}
    ask(client, messages=[*HELLO, update], reasoning={"effort": "max"})
    assert tokenizer.decode(engine.requests[0].token_ids).endswith(
        "Reasoning Effort: High<|user|>hello<|assistant|><think>"
    )
    refused = client.post("/api/v1/chat/completions", json={"messages": [update]})
    assert refused.status_code == 400
    assert "there is nothing to answer" in refused.json()["error"]["message"]


def test_failures_say_whether_to_try_again(client: TestClient, engine: ScriptedEngine) -> None:
    engine.fails_after = 0
    for failure, advice in (("engine", "false"), ("disk", "true"), ("died", "true")):
        engine.failure = failure  # type: ignore[assignment]
        response = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert response.headers["x-should-retry"] == advice
        assert ("retry-after" in response.headers) == (advice == "true")


def test_tokens_go_there_and_back(client: TestClient, tokenizer: Tokenizer) -> None:
    for field in ("prompt", "content"):
        tokens = client.post("/tokenize", json={field: "Ærø <think>"}).json()
        assert tokens["tokens"] == tokenizer.encode("Ærø <think>")
        assert tokens["count"] == len(tokens["tokens"])
        assert client.post("/v1/detokenize", json={"tokens": tokens["tokens"]}).json()[field] == "Ærø <think>"
    chat = client.post("/tokenize", json={"messages": HELLO, "reasoning_effort": "none"}).json()
    assert tokenizer.decode(chat["tokens"]) == "[gMASK]<sop><|user|>hello<|assistant|><think></think>"
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/tokenize", json={"messages": [{"role": "wizard"}]}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_the_old_calls_of_openrouter_are_answered(client: TestClient) -> None:
    assert client.get("/api/v1/auth/key").json()["data"]["is_free_tier"] is False
    assert client.get("/api/v1/models/user").json()["data"][0]["id"] == GLM
    assert client.get("/api/v1/models/z-ai/glm-5.2:free/endpoints").status_code == 200
    assert client.get("/api/v1/models/z-ai/other/endpoints").status_code == 404
    assert client.get("/api/v1/generation?id=gen-0").status_code == 404
    assert joined_calls(stream(client)) == []


def test_as_many_tokens_as_the_catalogue_names_are_not_too_many(client: TestClient) -> None:
    card = client.get("/api/v1/models").json()["data"][0]
    [endpoint] = client.get(f"/api/v1/models/{GLM}/endpoints").json()["data"]["endpoints"]
    for named in (card["top_provider"], endpoint):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": named["max_completion_tokens"]}
        assert client.post("/api/v1/chat/completions", json=body).status_code == 200
