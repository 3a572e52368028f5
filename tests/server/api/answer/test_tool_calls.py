"""Tool calls on the wire, whole and streamed, and an agent's loop through openai-python."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.glm.tokenizer import Tokenizer
from tests.server.api.dialects.test_chat import ask, joined, stream
from tests.server.api.scripted import ScriptedEngine

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
OSLO = (
    "<tool_call>weather<arg_key>city</arg_key><arg_value> Oslo\n</arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value></tool_call>"
)
BERGEN = "<tool_call>weather<arg_key>city</arg_key><arg_value>Bergen</arg_value></tool_call>"


@pytest.fixture
def says(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., None]:
    """Lets the engine say these turns, one for each request."""

    def say(*turns: str) -> None:
        engine.turns = [tokenizer.encode(turn) for turn in turns]

    return say


def joined_calls(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What openai-python's documentation tells clients to do with deltas."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert part["index"] == len(calls)
                    calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return calls


@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_calls_are_in_the_message_and_in_the_stream(
    client: TestClient, says: Callable[..., None], before: str
) -> None:
    says(*[f"hm</think>{before}{OSLO}{BERGEN}<|observation|>"] * 2)
    [choice] = ask(client, tools=TOOLS)["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == ("tool_calls", "tool_calls")
    assert (message["content"], message["reasoning"]) == (before or None, "hm")
    assert [call["index"] for call in message["tool_calls"]] == [0, 1]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    arguments = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    assert arguments == [{"city": " Oslo\n", "days": 2}, {"city": "Bergen"}]

    chunks = stream(client, tools=TOOLS)
    calls = joined_calls(chunks)
    assert [call["arguments"] for call in calls] == [
        call["function"]["arguments"] for call in message["tool_calls"]
    ]
    assert [call["name"] for call in calls] == ["weather", "weather"]
    assert len({call["id"] for call in [*calls, *message["tool_calls"]]}) == 4
    assert joined(chunks, "content") == before
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


def test_call_deltas_have_the_fields_that_clients_check(
    client: TestClient, says: Callable[..., None]
) -> None:
    says(f"</think>{OSLO}<|observation|>")
    deltas = [c["delta"] for chunk in stream(client, tools=TOOLS) for c in chunk["choices"]]
    first, *rest = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert first["type"] == "function"
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert len(rest) > 5, "arguments come in fragments"
    assert all(part.keys() == {"index", "function"} for part in rest)


@pytest.mark.parametrize("num_tokens_missing", [1, 2, 6, 9, 12, 15])
def test_a_call_that_is_cut_off_has_partial_arguments_and_the_reason_is_length(
    client: TestClient, says: Callable[..., None], tokenizer: Tokenizer, num_tokens_missing: int
) -> None:
    says(*["</think>So: " + OSLO] * 2)
    kept = tokenizer.encode("</think>So: " + OSLO)[:-num_tokens_missing]
    [choice] = ask(client, tools=TOOLS, max_tokens=len(kept))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "So: ")
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["index"]) == ("weather", 0)
    assert '{"city": " Oslo\\n", "days": 2}'.startswith(call["function"]["arguments"])
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"] or "{}")
    chunks = stream(client, tools=TOOLS, max_tokens=len(kept))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert joined(chunks, "content") == "So: "
    assert [one["arguments"] for one in joined_calls(chunks)] == [call["function"]["arguments"]]


@pytest.mark.parametrize("num_tokens", [2, 3, 4])
def test_a_call_that_is_cut_off_in_its_name_is_nothing(
    client: TestClient, says: Callable[..., None], tokenizer: Tokenizer, num_tokens: int
) -> None:
    says(*["</think>" + OSLO] * 2)
    [choice] = ask(client, tools=TOOLS, max_tokens=num_tokens)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert "tool_calls" not in choice["message"]
    chunks = stream(client, tools=TOOLS, max_tokens=num_tokens)
    assert (joined(chunks, "content"), joined_calls(chunks)) == ("", [])


MALFORMED = {
    "<tool_call>weather<arg_key>city</arg_key></tool_call>": '{"city": ',
    "<tool_call>weather<arg_value>Oslo</arg_value></tool_call>": "{",
    "<tool_call>weather</arg_value></tool_call>": "{",
    "<tool_call>weather<arg_key>city</arg_key>is <arg_value>Oslo</arg_value></tool_call>": '{"city": ',
    OSLO.replace("</tool_call>", "<arg_key>city</arg_key></tool_call>"): '{"city": " Oslo\\n", "days": 2',
    "<tool_call>weather<arg_key>city": "{",
}


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.parametrize(("before", "behind"), [("", ""), ("", BERGEN), (BERGEN, ""), (BERGEN, BERGEN)])
def test_a_malformed_call_comes_once_and_leaves_no_gap(
    client: TestClient, says: Callable[..., None], malformed: str, before: str, behind: str
) -> None:
    says(*[f"hm</think>I see.{before}{malformed}{behind}<|observation|>"] * 2)
    [choice] = ask(client, tools=TOOLS)["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("length", "I see.")
    whole = ['{"city": "Bergen"}']
    expected = whole * bool(before) + [MALFORMED[malformed]] + whole * bool(behind)
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == expected
    assert [call["index"] for call in message["tool_calls"]] == list(range(len(expected)))
    chunks = stream(client, tools=TOOLS)
    assert [call["arguments"] for call in joined_calls(chunks)] == expected
    assert joined(chunks, "content") == "I see."
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "quoted",
    [
        BERGEN,
        "<arg_value>Oslo</arg_value></tool_call>",
        BERGEN + BERGEN,
        "see <arg_value>x</arg_value><arg_key>k</arg_key><arg_value>v</arg_value></tool_call>",
    ],
)
def test_no_markup_is_left_of_a_call_that_quotes_a_call(
    client: TestClient, says: Callable[..., None], quoted: str
) -> None:
    value = f"<arg_key>city</arg_key><arg_value>{quoted}</arg_value>"
    says(*[f"hm</think>I see.<tool_call>weather{value}</tool_call><|observation|>"] * 2)
    [choice] = ask(client, tools=TOOLS)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "I see.")
    chunks = stream(client, tools=TOOLS)
    assert joined(chunks, "content") == "I see."


@pytest.mark.parametrize("thought", ["It is 4.", "  four \n", "Is <tool_call> a tag? é", 'So {"a": 1}'])
def test_an_answer_that_ends_inside_its_thought_is_that_thought(
    client: TestClient, says: Callable[..., None], tokenizer: Tokenizer, thought: str
) -> None:
    says(*[thought + "<|user|>"] * 2, *[thought] * 2)
    [choice] = ask(client, tools=TOOLS)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", thought)
    assert joined(stream(client, tools=TOOLS), "content") == thought
    limit = len(tokenizer.encode(thought))
    [choice] = ask(client, tools=TOOLS, max_tokens=limit)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert joined(stream(client, tools=TOOLS, max_tokens=limit), "content") == ""


def test_rejected_calls_are_counted_and_logged(
    client: TestClient, says: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def count() -> float:
        [line] = [one for one in client.get("/metrics").text.splitlines() if one.startswith(NAME)]
        return float(line.split()[1])

    before = count()
    says(f"</think>{BERGEN}<tool_call>two words</tool_call><|observation|>", f"</think>{OSLO}<|observation|>")
    ask(client, tools=TOOLS)
    assert count() == before + 1
    [record] = [one for one in caplog.records if "was not passed on" in one.message]
    assert "two words" in record.message
    ask(client, tools=TOOLS)
    assert count() == before + 1


NAME = "glmserve_rejected_tool_calls_total"


def test_a_cut_second_call_leaves_the_first_and_the_reason_length(
    client: TestClient, says: Callable[..., None], tokenizer: Tokenizer
) -> None:
    says("</think>" + OSLO + BERGEN)
    num_tokens = len(tokenizer.encode("</think>" + OSLO + BERGEN)) - 1
    [choice] = ask(client, tools=TOOLS, max_tokens=num_tokens)["choices"]
    assert choice["finish_reason"] == "length"
    first, second = (call["function"]["arguments"] for call in choice["message"]["tool_calls"])
    assert json.loads(first) == {"city": " Oslo\n", "days": 2}
    assert second == '{"city": "Bergen"'


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_nothing_is_a_call(
    client: TestClient, says: Callable[..., None], fields: dict[str, Any]
) -> None:
    says("</think>" + BERGEN + "<|user|>")
    [choice] = ask(client, **fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (BERGEN, "stop")


def test_one_call_at_a_time_if_so_wished(
    client: TestClient, says: Callable[..., None], engine: ScriptedEngine
) -> None:
    says(*["</think>" + OSLO + BERGEN + "<|observation|>"] * 2)
    [choice] = ask(client, tools=TOOLS, parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert len(joined_calls(stream(client, tools=TOOLS, parallel_tool_calls=False))) == 1
    assert len(engine.cancelled) == 2


def test_text_before_a_call_is_not_held_back_for_a_stop_string_until_behind_it(
    client: TestClient, says: Callable[..., None]
) -> None:
    """What might have become a stop string cannot any more when a call begins."""
    says("</think>Let me see" + BERGEN + "<|observation|>")
    chunks = stream(client, tools=TOOLS, stop=["see you"])
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    first_call = next(place for place, delta in enumerate(deltas) if "tool_calls" in delta)
    assert "".join(delta.get("content", "") for delta in deltas[:first_call]) == "Let me see"
    assert len(joined_calls(chunks)) == 1


@pytest.mark.parametrize(
    "fields", [{}, {"reasoning": {"enabled": False}}, {"response_format": {"type": "json_object"}}]
)
def test_that_no_tool_may_be_called_does_not_change_the_prompt(
    client: TestClient, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    for choice in ("auto", "none"):
        ask(client, tools=TOOLS, tool_choice=choice, **fields)
    free, bound = engine.requests
    assert free.token_ids == bound.token_ids
    assert bound.grammar
    assert "tool_call" not in bound.grammar


def run_tool(call: Any) -> str:
    arguments = json.loads(call.function.arguments)
    return f"{arguments['city'].strip()}: 4 C"


@pytest.mark.parametrize("is_streaming", [False, True])
def test_an_agent_loops_through_openai_python(
    base_url: str,
    says: Callable[..., None],
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    is_streaming: bool,
) -> None:
    says(f"ask</think>{OSLO}{BERGEN}<|observation|>", "told</think>Both have 4 C.<|user|>")
    messages: list[Any] = [{"role": "user", "content": "weather in Oslo and Bergen?"}]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as api:
        while True:
            message = _turn(api, messages, is_streaming)
            messages.append(message.to_dict())
            if not message.tool_calls:
                break
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": run_tool(call)}
                for call in message.tool_calls
            ]
    assert messages[-1]["content"] == "Both have 4 C."
    prompt = tokenizer.decode(engine.requests[-1].token_ids)
    assert prompt.endswith(
        f"<|assistant|><think>ask</think>{OSLO}{BERGEN}<|observation|><tool_response>Oslo: 4 C"
        "</tool_response><tool_response>Bergen: 4 C</tool_response><|assistant|><think>"
    )


def _turn(api: openai.OpenAI, messages: list[Any], is_streaming: bool) -> Any:
    tools: Any = TOOLS
    if not is_streaming:
        answer = api.chat.completions.create(model="z-ai/glm-5.2", messages=messages, tools=tools)
        return answer.choices[0].message
    with api.chat.completions.stream(model="z-ai/glm-5.2", messages=messages, tools=tools) as events:
        return events.get_final_completion().choices[0].message
