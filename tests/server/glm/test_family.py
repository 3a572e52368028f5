"""The templates of GLM-5, 5.1, 5.2 and 5.3: what the server makes of each, and that prompts only grow.

The real templates come with their checkpoints. Those in `family/` were written from what is known of how they
differ; ours, for 5.2, is the one that ships.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.answer_parser import prompt_is_thinking
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from tests.grids import few
from tests.server.api.scripted import ScriptedEngine

FOLDER = Path(__file__).with_name("family")
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
MARK = {"cache_control": {"type": "ephemeral"}}  # litellm puts it on tools of this model
CALL = "<tool_call>f<arg_key>a</arg_key><arg_value> x\n</arg_value></tool_call>"


def template_of(name: str) -> ChatTemplate:
    match name:
        case "5.2":
            return ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), name)
        case "5.3-flash":
            return ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), name, always_thinks=True)
        case "5.3":
            return ChatTemplate((FOLDER / "glm-5.3.jinja").read_text(encoding="utf-8"), name)
        case _:
            source = (FOLDER / "glm-5.jinja").read_text(encoding="utf-8")
            return ChatTemplate(f"{{% set is_5_1 = {name == '5.1'} %}}" + source, name)


def client_of(name: str, tokenizer: Tokenizer, script: str) -> tuple[TestClient, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer.encode(script), context_length=1_000_000)
    dialect = Dialect(tokenizer, template_of(name))
    return TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2")))), engine


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(call_id: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps({"a": " x\n"})},
    }


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    assistant("A", reasoning="R"),
    {"role": "user", "content": "V"},
    assistant(None, tool_calls=[call("1"), call("2")]),
    {"role": "tool", "tool_call_id": "2", "content": "two"},
    {"role": "tool", "tool_call_id": "1", "content": "one"},
]
TWO_ONE = "<|observation|><tool_response>two</tool_response><tool_response>one</tool_response>"
ONE_TWO = "<|observation|><tool_response>one</tool_response><tool_response>two</tool_response>"
KEPT, CLEARED = "<|assistant|><think>R</think>A", "<|assistant|>{}</think>A"


@pytest.mark.parametrize(
    ("name", "fields", "golden"),
    [
        ("5", {}, f"{KEPT}<|user|>V<|assistant|></think>{CALL}{CALL}{TWO_ONE}<|assistant|><think>"),
        ("5.1", {}, f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{TWO_ONE}<|assistant|><think>"),
        ("5.2", {}, f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{TWO_ONE}<|assistant|><think>"),
        ("5.3", {}, f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{ONE_TWO}<|assistant|><think>"),
        (
            "5.3-flash",
            {},
            f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{ONE_TWO}<|assistant|><think>",
        ),
        (
            "5",
            {"reasoning": {"enabled": False}},
            f"{KEPT}<|user|>V<|assistant|></think>{CALL}{CALL}{TWO_ONE}<|assistant|></think>",
        ),
        (
            "5.1",
            {"reasoning": {"enabled": False}},
            f"{KEPT}<|user|>V<|assistant|></think>{CALL}{CALL}{TWO_ONE}<|assistant|></think>",
        ),
        (
            "5.2",
            {"reasoning": {"enabled": False}},
            f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{TWO_ONE}<|assistant|><think></think>",
        ),
        (
            "5.3",
            {"reasoning": {"enabled": False}},
            f"{KEPT}<|user|>V<|assistant|><think></think>{CALL}{CALL}{ONE_TWO}<|assistant|><think>",
        ),
    ],
)
def test_goldens(tokenizer: Tokenizer, name: str, fields: dict[str, Any], golden: str) -> None:
    client, engine = client_of(name, tokenizer, "R</think>A<|user|>")
    body = {"messages": CONVERSATION} | fields
    result = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    has_effort = name.startswith("5.3") or (name == "5.2" and not fields)
    effort = "<|system|>Reasoning Effort: Max" if has_effort else ""
    prompt = engine.requests[0].token_ids
    assert tokenizer.decode(prompt) == f"[gMASK]<sop>{effort}<|system|>S<|user|>U{golden}"
    is_thinking = golden.endswith("<think>")
    assert prompt_is_thinking(tokenizer, prompt) is is_thinking
    assert bool(engine.requests[0].thought) is is_thinking
    expected = {"reasoning": "R", "content": "A"} if is_thinking else {"content": "RA"}
    assert {key: result[key] for key in ("reasoning", "content") if key in result} == expected


@pytest.mark.parametrize(
    ("name", "start"),
    [("5", "[gMASK]<sop>"), ("5.1", "[gMASK]<sop>"), ("5.2", None), ("5.3", None), ("5.3-flash", None)],
)
def test_old_thoughts_are_cleared_where_the_client_wants_it(
    tokenizer: Tokenizer, name: str, start: str | None
) -> None:
    client, engine = client_of(name, tokenizer, "<|user|>")
    body = {"messages": CONVERSATION[:4], "thinking": {"type": "enabled", "clear_thinking": True}}
    client.post("/v1/chat/completions", json=body)
    prompt = tokenizer.decode(engine.requests[0].token_ids)
    assert CLEARED.format("" if start else "<think>") in prompt
    assert KEPT not in prompt


@pytest.mark.parametrize(
    ("name", "line"),
    [("5", "{" + json.dumps(TOOL)[1:]), ("5.1", '{"name": "f", "parameters": {"type": "object"}}')],
)
def test_the_tool_list_is_as_each_was_trained_on(tokenizer: Tokenizer, name: str, line: str) -> None:
    client, engine = client_of(name, tokenizer, "<|user|>")
    client.post("/v1/chat/completions", json={"messages": CONVERSATION, "tools": [TOOL | MARK]})
    assert f"<tools>\n{line}\n</tools>" in tokenizer.decode(engine.requests[0].token_ids)


@pytest.mark.parametrize(
    ("name", "user_every"),
    few([("5", 7), ("5.1", 7), ("5.2", None), ("5.2", 7), ("5.3", None), ("5.3", 7)], ["5", "5.2"]),
)
@pytest.mark.slow
def test_a_prompt_begins_with_the_last_prompt_and_its_answer(
    tokenizer: Tokenizer, name: str, user_every: int | None
) -> None:
    """Forty turns of an agent that sends back what it got, with a word of the user now and then."""
    client, engine = client_of(name, tokenizer, "")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    before: list[int] = []
    for turn in range(40):
        value = f' é{turn}\n</arg_valu "'
        answer = (
            f"thought {turn}</think>Step {turn}.<tool_call>f<arg_key>a</arg_key><arg_value>{value}"
            f'</arg_value><arg_key>b</arg_key><arg_value>{{"x": [1, {turn}.5, null]}}</arg_value>'
            "</tool_call><|observation|>"
        )
        engine.turns = [tokenizer.encode(answer)]
        body = {"messages": messages, "tools": [TOOL]}
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        prompt = list(engine.requests[-1].token_ids)
        assert prompt[: len(before)] == before, f"turn {turn}"
        before = prompt + tokenizer.encode(answer)
        messages += [
            message,
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "ok"},
        ]
        if user_every and turn % user_every == user_every - 1:
            messages.append({"role": "user", "content": f"and {turn}"})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "Max"),
        ({"reasoning_effort": "low"}, "Low"),
        ({"reasoning_effort": "minimal"}, "Low"),
        ({"reasoning": {"effort": "medium"}}, "High"),
        ({"reasoning": {"effort": "high"}}, "High"),
        ({"reasoning": {"effort": "xhigh"}}, "Max"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}}, "Max"),
        ({"reasoning": {"enabled": True}}, "Max"),
        ({"reasoning": {"enabled": False}}, "Low"),
        ({"reasoning_effort": "none"}, "Low"),
        ({"thinking": {"type": "disabled"}}, "Low"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "Low"),
    ],
)
def test_flash_thinks_with_one_of_three_efforts(
    tokenizer: Tokenizer, fields: dict[str, Any], word: str
) -> None:
    client, engine = client_of("5.3-flash", tokenizer, "</think>A<|user|>")
    client.post("/v1/chat/completions", json={"messages": CONVERSATION[:2]} | fields)
    prompt = tokenizer.decode(engine.requests[0].token_ids)
    assert prompt == f"[gMASK]<sop><|system|>Reasoning Effort: {word}<|system|>S<|user|>U<|assistant|><think>"


@pytest.mark.parametrize("ids", [("1", None), ("1", "7"), (None, None)])
def test_results_without_the_ids_of_their_calls_stay_in_order(
    tokenizer: Tokenizer, ids: tuple[str | None, str | None]
) -> None:
    template = template_of("5.3-flash")
    results = [{"role": "tool", "tool_call_id": name, "content": f"{i}"} for i, name in enumerate(ids)]
    made = {"function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "U"},
        assistant("", tool_calls=[made | {"id": "2"}, made | {"id": "1"}]),
        *results,
        {"role": "user", "content": "W"},
    ]
    text = template.render(messages, None, template.options("low", None))
    assert "<|observation|><tool_response>0</tool_response><tool_response>1</tool_response><|user|>W" in text


@pytest.mark.parametrize("served", ["z-ai/glm-5.3-flash", "zai-org/GLM-5.3-Flash", "GLM-5.3-flash:free"])
def test_flash_is_known_by_its_ids(served: str) -> None:
    ModelNames("z-ai/glm-5.3-flash").check(served, [])
