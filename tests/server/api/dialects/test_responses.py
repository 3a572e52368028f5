"""OpenAI's Responses, through openai-python, unmodified but for its URL."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.api.dialects.responses_schema import seal
from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import BERGEN, OSLO
from tests.server.api.answer.test_tool_calls import TOOLS as CHAT_TOOLS
from tests.server.api.scripted import ScriptedEngine
from tests.server.api.test_socket import until

GLM = "z-ai/glm-5.2"
WEATHER: Any = CHAT_TOOLS[0]["function"]
TOOLS: Any = [{"type": "function", **WEATHER}]


@pytest.fixture
def sdk(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def says(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., None]:
    def say(*turns: str) -> None:
        engine.turns = [tokenizer.encode(turn) for turn in turns]

    return say


def create(sdk: openai.OpenAI, is_streaming: bool, **fields: Any) -> Any:
    """The response, and in a stream that of its last event; the events must lead to the same."""
    fields = {"model": GLM, "input": "hello"} | fields
    if not is_streaming:
        return sdk.responses.create(**fields)
    events: list[Any] = list(sdk.responses.create(stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    done = [event.item.to_dict() for event in events if event.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in last.response.output]
    for index, item in enumerate(last.response.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        deltas = "".join(getattr(event, "delta", "") for event in own)
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
    return last.response


both = pytest.mark.parametrize("is_streaming", [False, True])


@both
def test_a_thought_and_a_text(sdk: openai.OpenAI, is_streaming: bool) -> None:
    response = create(sdk, is_streaming)
    thought, message = response.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "hm", [])
    assert (message.type, response.output_text) == ("message", "Hi Ærø 👋!")
    assert (response.status, response.model, response.store) == ("completed", GLM, False)
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.temperature == 0.7


@both
def test_tools_go_round(
    sdk: openai.OpenAI,
    says: Callable[..., None],
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    is_streaming: bool,
) -> None:
    says(f"ask</think>Let me see.{OSLO}{BERGEN}<|observation|>", "told</think>4 C.<|user|>")
    response = create(sdk, is_streaming, tools=TOOLS, instructions="S")
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    calls = response.output[2:]
    assert [json.loads(call.arguments) for call in calls] == [
        {"city": " Oslo\n", "days": 2},
        {"city": "Bergen"},
    ]
    items = [{"role": "user", "content": "hello"}, *(item.to_dict() for item in response.output)]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "4 C"} for call in calls]
    response = create(sdk, is_streaming, tools=TOOLS, instructions="S", input=items)
    assert response.output_text == "4 C."
    assert tokenizer.decode(engine.requests[-1].token_ids).endswith(
        f"<|system|>S<|user|>hello<|assistant|><think>ask</think>Let me see.{OSLO}{BERGEN}<|observation|>"
        "<tool_response>4 C</tool_response><tool_response>4 C</tool_response><|assistant|><think>"
    )


@both
def test_a_call_that_is_cut_off_is_closed_as_incomplete(
    sdk: openai.OpenAI, says: Callable[..., None], tokenizer: Tokenizer, is_streaming: bool
) -> None:
    says("</think>" + BERGEN + OSLO)
    kept = tokenizer.encode("</think>" + BERGEN + OSLO)[:-5]
    fields: Any = {"model": GLM, "input": "x", "tools": TOOLS, "max_output_tokens": len(kept)}
    check_incomplete(sdk, fields, ["completed", "incomplete"], is_streaming)


def check_incomplete(sdk: openai.OpenAI, fields: Any, statuses: list[str], is_streaming: bool) -> None:
    if is_streaming:
        events: list[Any] = list(sdk.responses.create(stream=True, **fields))
        response = events[-1].response
        done = [event for event in events if event.type == "response.output_item.done"]
        assert [(event.output_index, event.item.status) for event in done] == list(enumerate(statuses))
        ended = [one for one in events if one.type == "response.function_call_arguments.done"]
        assert len(ended) == statuses.count("completed")
    else:
        response = sdk.responses.create(**fields)
    assert [item.type for item in response.output] == ["function_call"] * len(statuses)
    assert [item.status for item in response.output] == statuses
    assert response.output_text == ""
    for item in response.output:
        assert item.arguments.startswith("{")
        assert item.arguments.endswith("}") is (item.status == "completed")
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


@both
@pytest.mark.parametrize(
    "malformed",
    [
        "<tool_call>weather<arg_value>Oslo</arg_value></tool_call>",
        "<tool_call>weather<arg_key>city</arg_key></tool_call>",
        OSLO.replace("</tool_call>", "and</tool_call>"),
    ],
)
def test_a_malformed_call_leaves_no_gap(
    sdk: openai.OpenAI, says: Callable[..., None], malformed: str, is_streaming: bool
) -> None:
    says(f"</think>{malformed}{BERGEN}<|observation|>")
    fields: Any = {"model": GLM, "input": "x", "tools": TOOLS}
    check_incomplete(sdk, fields, ["incomplete", "completed"], is_streaming)


def test_the_sdk_puts_a_stream_together(sdk: openai.OpenAI, says: Callable[..., None]) -> None:
    says(f"ask</think>Let me see.{OSLO}<|observation|>")
    with sdk.responses.stream(model=GLM, input="hello", tools=TOOLS) as events:
        for _ in events:
            pass
        response = events.get_final_response()
    call: Any = response.output[-1]
    assert json.loads(call.arguments) == {"city": " Oslo\n", "days": 2}


def test_a_model_of_pydantic_becomes_a_schema(
    sdk: openai.OpenAI, says: Callable[..., None], engine: ScriptedEngine
) -> None:
    class City(BaseModel):
        name: str

    says('</think>{"name": "Oslo"}<|user|>')
    response = sdk.responses.parse(model=GLM, input="hello", text_format=City)
    assert response.output_parsed == City(name="Oslo")
    assert '"name"' in engine.requests[0].grammar
    assert response.text
    assert response.text.format
    assert response.text.format.type == "json_schema"


def test_a_thought_comes_back_in_every_form(
    sdk: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    response = create(sdk, False, include=["reasoning.encrypted_content"])
    assert response.output[0].encrypted_content == seal("hm")
    for thought in (
        {"content": [{"type": "reasoning_text", "text": "hm"}]},
        {"summary": [{"type": "summary_text", "text": "hm"}]},
        {"encrypted_content": seal("hm")},
    ):
        items = [
            {"role": "user", "content": "hello"},
            {"type": "reasoning", "id": "rs_1", "summary": []} | thought,
            {"role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]},
            {"role": "developer", "content": [{"type": "input_text", "text": "D"}]},
            {"role": "assistant", "content": "a"},
            {"type": "message", "role": "assistant", "content": "b"},
        ]
        create(sdk, False, input=items, reasoning={"effort": "low"})
        assert tokenizer.decode(engine.requests[-1].token_ids) == (
            "[gMASK]<sop><|system|>Reasoning Effort: High<|user|>hello<|assistant|><think>hm</think>Hi"
            "<|system|>D<|assistant|><think></think>a<|assistant|><think></think>b<|assistant|><think>"
        )


@both
def test_log_probabilities_go_with_the_text(sdk: openai.OpenAI, is_streaming: bool) -> None:
    response = create(sdk, is_streaming, top_logprobs=2, include=["message.output_text.logprobs"])
    scores = response.output[-1].content[0].logprobs
    assert b"".join(bytes(score.bytes) for score in scores).decode() == "Hi Ærø 👋!"
    assert len(scores[0].top_logprobs) == 2


def test_choice_limits_and_sampling_reach_the_engine(
    sdk: openai.OpenAI, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    create(sdk, False, tools=TOOLS, tool_choice={"type": "function", "name": "weather"})
    assert "weather" in engine.requests[-1].grammar
    create(sdk, False, max_output_tokens=7, temperature=0.5, extra_body={"top_k": 3, "seed": 1})
    request = engine.requests[-1]
    assert (request.max_tokens, request.sampling.temperature) == (7, 0.5)
    assert (request.sampling.top_k, request.sampling.seed) == (3, 1)
    create(sdk, False, reasoning={"effort": "none"})
    assert tokenizer.decode(engine.requests[-1].token_ids).endswith("</think>")


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "'previous_response_id' is not supported.*stores no responses"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input_image"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "%"}]}, "encrypted_content"),
        ({"input": [{"role": "user", "text": "hi"}]}, "needs 'content'"),
        ({"tool_choice": {"type": "web_search"}}, "web_search"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "text.format"),
        ({"model": "gpt-9"}, "is not a valid model ID"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    sdk: openai.OpenAI, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        create(sdk, False, **fields)


def test_a_stored_response_is_not_there(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="stores none"):
        sdk.responses.retrieve("resp_1")


def test_a_failure_is_the_last_event(sdk: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.fails_after = 3
    last = list(sdk.responses.create(model=GLM, input="x", stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error
    assert "the disk is gone" in last.response.error.message
    with pytest.raises(openai.InternalServerError, match="the disk is gone"):
        create(sdk, False)


def test_hanging_up_cancels(sdk: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.token_s = 0.05
    with sdk.responses.create(model=GLM, input="x", stream=True) as events:
        next(iter(events))
    until(lambda: engine.cancelled)


# Keys that the SDKs' types want, null or not; both of OpenRouter's and OpenAI's.
NULLABLE = {
    "completed_at", "presence_penalty", "frequency_penalty", "background", "max_tool_calls", "service_tier",
    "safety_identifier", "prompt_cache_key", "error", "incomplete_details", "instructions", "metadata",
    "max_output_tokens", "previous_response_id", "reasoning", "top_logprobs", "truncation", "user", "usage",
    "store", "text", "tool_choice", "tools", "parallel_tool_calls", "temperature", "top_p", "output",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_output_tokens": 2}, {"service_tier": "flex", "prompt_cache_key": "k", "max_tool_calls": 3}],
)
def test_every_response_object_has_the_keys_that_may_be_null(
    client: TestClient, fields: dict[str, Any]
) -> None:
    body = {"input": "hello"} | fields
    whole = client.post("/v1/responses", json=body).json()
    streamed = client.post("/v1/responses", json=body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    objects = [whole, *(event["response"] for event in events if "response" in event)]
    assert len(objects) == 4
    for one in objects:
        assert one.keys() >= NULLABLE
