"""Anthropic's Messages, through its own SDK, unmodified but for its URL."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from starlette.testclient import TestClient

from server.api.access.guard import Access
from server.api.access.keys import KeyRing
from server.api.app import make_app
from server.api.service import Service
from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import BERGEN, OSLO
from tests.server.api.conftest import running_server
from tests.server.api.scripted import ScriptedEngine
from tests.server.api.test_socket import until

GLM = "z-ai/glm-5.2"
HELLO: Any = [{"role": "user", "content": "hello"}]
THINKS: Any = {"type": "enabled", "budget_tokens": 2000}
TOOLS: Any = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
        "cache_control": {"type": "ephemeral"},
    }
]


@pytest.fixture
def sdk(base_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def says(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., None]:
    def say(*turns: str) -> None:
        engine.turns = [tokenizer.encode(turn) for turn in turns]

    return say


def create(sdk: anthropic.Anthropic, is_streaming: bool, **fields: Any) -> anthropic.types.Message:
    """The message, and in a stream the one that the SDK puts together from its events."""
    fields = {"model": GLM, "max_tokens": 1000, "messages": HELLO} | fields
    if not is_streaming:
        message: anthropic.types.Message = sdk.messages.create(**fields)
        return message
    with sdk.messages.stream(**fields) as events:
        return events.get_final_message()


both = pytest.mark.parametrize("is_streaming", [False, True])


@both
def test_a_thought_and_a_text(sdk: anthropic.Anthropic, is_streaming: bool) -> None:
    message = create(sdk, is_streaming, thinking=THINKS)
    thought, text = message.content
    assert thought.type == "thinking"
    assert (thought.thinking, bool(thought.signature)) == ("hm", True)
    assert text.type == "text"
    assert text.text == "Hi Ærø 👋!"
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    assert message.model == GLM
    assert message.usage.input_tokens > 5
    assert message.usage.output_tokens > 5


@both
def test_who_does_not_ask_for_a_thought_gets_none(
    sdk: anthropic.Anthropic,
    says: Callable[..., None],
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    is_streaming: bool,
) -> None:
    says("Hi!<|user|>")
    [text] = create(sdk, is_streaming).content
    assert text.type == "text"
    assert text.text == "Hi!"
    assert tokenizer.decode(engine.requests[0].token_ids).endswith("<|assistant|><think></think>")


@both
def test_tools_go_round(
    sdk: anthropic.Anthropic,
    says: Callable[..., None],
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    is_streaming: bool,
) -> None:
    says(f"ask</think>Let me see.{OSLO}{BERGEN}<|observation|>", "told</think>4 C.<|user|>")
    fields: dict[str, Any] = {"thinking": THINKS, "tools": TOOLS}
    message = create(sdk, is_streaming, **fields)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [call.input for call in calls] == [{"city": " Oslo\n", "days": 2}, {"city": "Bergen"}]
    assert message.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "4 C"} for call in calls]
    results[1]["content"] = [{"type": "text", "text": "5 C"}]  # type: ignore[assignment]
    messages = [*HELLO, {"role": "assistant", "content": message.content}]
    messages.append({"role": "user", "content": [*results, {"type": "text", "text": "and?"}]})
    last = create(sdk, is_streaming, messages=messages, **fields).content[-1]
    assert last.type == "text"
    assert last.text == "4 C."
    assert tokenizer.decode(engine.requests[-1].token_ids).endswith(
        f"<|user|>hello<|assistant|><think>ask</think>Let me see.{OSLO}{BERGEN}<|observation|>"
        "<tool_response>4 C</tool_response><tool_response>5 C</tool_response><|user|>and?<|assistant|><think>"
    )


@both
def test_a_call_that_is_cut_off_has_the_input_that_there_is(
    sdk: anthropic.Anthropic, says: Callable[..., None], tokenizer: Tokenizer, is_streaming: bool
) -> None:
    says("</think>" + BERGEN + OSLO)
    kept = tokenizer.encode("</think>" + BERGEN + OSLO)[:-5]
    message = create(sdk, is_streaming, thinking=THINKS, tools=TOOLS, max_tokens=len(kept))
    whole, cut = message.content
    assert whole.type == cut.type == "tool_use"
    assert (whole.input, cut.input) == ({"city": "Bergen"}, {"city": " Oslo\n"})
    assert message.stop_reason == "max_tokens"


@both
@pytest.mark.parametrize(
    ("malformed", "given"),
    [
        ("<tool_call>weather<arg_value>Oslo</arg_value></tool_call>", {}),
        ("<tool_call>weather<arg_key>city</arg_key></tool_call>", {}),
        (OSLO.replace("</tool_call>", "and</tool_call>"), {"city": " Oslo\n", "days": 2}),
    ],
)
def test_a_malformed_call_is_one_block(
    sdk: anthropic.Anthropic, says: Callable[..., None], malformed: str, given: Any, is_streaming: bool
) -> None:
    says(f"</think>I see.{malformed}{BERGEN}<|observation|>")
    message = create(sdk, is_streaming, thinking=THINKS, tools=TOOLS)
    text, broken, whole = message.content
    assert (text.type, broken.type, whole.type) == ("text", "tool_use", "tool_use")
    assert text.type == "text"
    assert text.text == "I see."
    assert broken.type == whole.type == "tool_use"
    assert (broken.input, whole.input) == (given, {"city": "Bergen"})
    assert message.stop_reason == "max_tokens"


@both
def test_a_stop_sequence_is_named(sdk: anthropic.Anthropic, is_streaming: bool) -> None:
    message = create(sdk, is_streaming, thinking=THINKS, stop_sequences=["none", "rø"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "rø")
    assert message.content[-1].type == "text"
    assert message.content[-1].text == "Hi Æ"


@both
def test_an_answer_may_fill_the_context(
    sdk: anthropic.Anthropic, engine: ScriptedEngine, is_streaming: bool
) -> None:
    engine.context_length = 60
    engine.script = [65] * 100
    message = create(sdk, is_streaming, max_tokens=20000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.input_tokens + message.usage.output_tokens == 60
    engine.context_length = 5
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long.*maximum context length is 5"):
        create(sdk, is_streaming)


def test_the_choice_of_tools_reaches_the_grammar(sdk: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        create(sdk, False, tools=TOOLS, tool_choice=choice)
        assert "weather" in engine.requests[-1].grammar
    create(sdk, False, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert "calls: call\n" in engine.requests[-1].grammar
    create(sdk, False, tools=TOOLS, tool_choice={"type": "auto"})
    assert engine.requests[-1].grammar == ""
    create(sdk, False, tools=TOOLS, tool_choice={"type": "none"})
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids
    assert engine.requests[-1].grammar.startswith("start: TEXT")


def test_thinking_and_the_other_fields_reach_the_engine(
    sdk: anthropic.Anthropic, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    output: Any = {"effort": "medium", "format": {"type": "json_schema", "schema": schema}}
    create(
        sdk,
        False,
        system=[{"type": "text", "text": "x-anthropic-billing-header: cch=1"}, {"type": "text", "text": "S"}],
        thinking=THINKS,
        output_config=output,
        extra_body={"temperature": 0.5, "top_k": 7, "top_p": 0.25},
        metadata={"user_id": "agent-7"},
    )
    [request] = engine.requests
    prompt = "[gMASK]<sop><|system|>Reasoning Effort: High<|system|>S<|user|>hello<|assistant|><think>"
    assert tokenizer.decode(request.token_ids) == prompt
    assert request.thought
    assert request.thought.max_tokens == 2000
    assert "integer" in request.grammar
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.5, 7, 0.25)
    assert request.max_tokens == 1000


def test_a_thought_may_be_left_out(sdk: anthropic.Anthropic) -> None:
    message = create(sdk, True, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["text"]


def test_tokens_are_counted_as_they_will_be(sdk: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    fields: Any = {"model": GLM, "messages": HELLO, "system": "S", "tools": TOOLS, "thinking": THINKS}
    count = sdk.messages.count_tokens(**fields).input_tokens
    create(sdk, False, **fields)
    assert count == len(engine.requests[0].token_ids)


def test_the_sdk_lists_the_model(sdk: anthropic.Anthropic) -> None:
    assert [model.id for model in sdk.models.list()] == [GLM]
    assert sdk.models.retrieve(GLM).id == GLM


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
NO_TOOL = {"type": "custom", "name": "web_search"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"system": [IMAGE]}, "image"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "must end with the user"),
        ({"messages": []}, "messages"),
        ({"tools": [NO_TOOL]}, "tools"),
        ({"tool_choice": {"type": "tool", "name": "g"}, "tools": TOOLS}, "'g'"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"model": "claude-sonnet-9"}, "is not a valid model ID"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    sdk: anthropic.Anthropic, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(sdk, False, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]


def test_a_failure_reaches_the_client_whole_and_in_a_stream(
    sdk: anthropic.Anthropic, engine: ScriptedEngine
) -> None:
    engine.fails_after, engine.failure = 1, "died"
    with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
        create(sdk, False)
    with pytest.raises(anthropic.APIStatusError, match="the disk is gone"):
        create(sdk, True)


def test_a_key_is_taken_from_either_header(service: Service) -> None:
    client = TestClient(make_app(service, Access(KeyRing([("me", "secret")]))))
    body = {"model": GLM, "max_tokens": 1, "messages": HELLO}
    for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
        assert client.post("/v1/messages", json=body, headers=headers).status_code == 200
    refused = client.post("/v1/messages", json=body, headers={"x-api-key": "no"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


def test_events_are_named_and_pings_go_between_them(service: Service, engine: ScriptedEngine) -> None:
    engine.token_s = 0.2
    body = {"model": GLM, "max_tokens": 3, "messages": HELLO, "stream": True}
    with (
        running_server(service) as url,
        httpx.stream("POST", f"{url}/v1/messages", json=body) as response,
    ):
        assert response.headers["request-id"] == response.headers["x-generation-id"]
        events = response.read().decode().split("\n\n")[:-1]
    names = [event.partition("event: ")[2].partition("\n")[0] for event in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("ping") >= 3
    assert "\nid:" not in "\n\n".join(events)
    for event, name in zip(events, names, strict=True):
        data = json.loads(event.partition("data: ")[2])
        assert data["type"] == name
        assert event.startswith(": OPENROUTER PROCESSING") == (name == "ping")


def test_an_error_after_blanks_has_anthropics_shape(service: Service, engine: ScriptedEngine) -> None:
    engine.token_s, engine.fails_after = 0.2, 1
    body = {"model": GLM, "max_tokens": 3, "messages": HELLO}
    with running_server(replace(service, patience_s=0.05)) as url:
        response = httpx.post(f"{url}/v1/messages", json=body)
    assert response.text.startswith(" ")
    assert response.json()["type"] == "error"


def test_hanging_up_cancels(sdk: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.token_s = 0.05
    with sdk.messages.stream(model=GLM, max_tokens=9, messages=HELLO) as events:
        next(iter(events))
    until(lambda: engine.cancelled)
