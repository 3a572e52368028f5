"""Grammars and limits of thought, through the whole server but its process border, with random weights."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.engine.decode.token_masks import Grammars, Matcher
from server.glm.templates.template import ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.messages import Failed, Finished, Generate, RequestEvent
from tests.grids import few
from tests.server.in_process import VOCAB, LoopEngine, random_engine

# The tools are left out: with random weights they would only make the prompt long.
TEMPLATE = """\
<|user|>{{ messages[0].content }}<|assistant|><think>{{ '' if enable_thinking else '</think>' }}"""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "color": {"enum": ["red", "green", None]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "maxItems": 2},
    },
    "required": ["name", "color", "count"],
    "additionalProperties": False,
    "$defs": {"Tag": {"type": "boolean"}, "Gait": {"type": "string", "enum": ["walk", "run"]}},
}


def tool(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "$defs": SCHEMA["$defs"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "move",
        {
            "to": {"enum": ["left", 'say "up"\n']},
            "steps": {"type": "integer", "minimum": 1, "maximum": 9},
            "gait": {"anyOf": [{"$ref": "#/$defs/Gait"}, {"type": "null"}]},
            "flag": {"$ref": "#/$defs/Tag"},
            "at": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        },
        ["to", "steps", "gait"],
    ),
    tool("stop", {}, []),
]


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer, tokenizer_folder: Path) -> Iterator[TestClient]:
    dialect = Dialect(tokenizer, ChatTemplate(TEMPLATE, "test"))
    with random_engine(tokenizer_folder) as engine:
        yield TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2"))))


def ask(client: TestClient, seed: int, **fields: Any) -> dict[str, Any]:
    chance = random.Random(seed)
    prompt = "".join(chance.choices('abc dé{"<\n', k=chance.randint(1, 40)))
    body = {"messages": [{"role": "user", "content": prompt}], "seed": seed, "reasoning": {"enabled": False}}
    response = client.post("/v1/chat/completions", json=body | fields)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice


def check_json(client: TestClient, seed: int, **fields: Any) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    choice = ask(client, seed, response_format=format_, **fields)
    assert choice["finish_reason"] == "stop"
    value = json.loads(choice["message"]["content"])
    assert {"name", "color", "count"} <= value.keys() <= SCHEMA["properties"].keys()
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert value["color"] in ("red", "green", None)
    assert value["count"] in range(100)
    assert all(isinstance(tag, bool) for tag in value.get("tags", []))


def check_call(client: TestClient, seed: int, choice: Any = "required", **fields: Any) -> str:
    answer = ask(client, seed, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **fields)
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "stop":
        assert arguments == {}
    else:
        assert call["function"]["name"] == "move"
        assert arguments["to"] in ("left", 'say "up"\n')
        assert arguments["steps"] in range(1, 10)
        assert arguments["gait"] in ("walk", "run", None)
        assert isinstance(arguments.get("flag", True), bool)
        assert all(isinstance(item, bool) for item in arguments.get("at", []))
    return str(call["function"]["name"])


@pytest.mark.parametrize("seed", few(range(6), [0, 1]))
def test_a_schema_holds(client: TestClient, seed: int) -> None:
    check_json(client, seed)


def test_a_forced_call_is_made(client: TestClient) -> None:
    assert {check_call(client, seed) for seed in range(8)} == {"move", "stop"}


def test_a_named_call_is_made(client: TestClient) -> None:
    named = {"type": "function", "function": {"name": "move"}}
    assert {check_call(client, seed, named) for seed in range(4)} == {"move"}


def test_a_forced_call_has_the_arguments_behind_a_reference_at_the_top(client: TestClient) -> None:
    [function] = [one["function"] for one in TOOLS if one["function"]["name"] == "move"]
    own = function["parameters"]
    inner = {name: own[name] for name in ("type", "properties", "required")}
    parameters = {"$ref": "#/$defs/Move", "$defs": own["$defs"] | {"Move": inner}}
    tools = [{"type": "function", "function": {"name": "move", "parameters": parameters}}]
    for seed in range(3):
        answer = ask(client, seed, tools=tools, tool_choice="required", parallel_tool_calls=False)
        arguments = json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"])
        assert arguments["to"] in ("left", 'say "up"\n')
        assert arguments["steps"] in range(1, 10)


TO = {"type": "object", "properties": {"to": {"enum": ["left", "90"]}}, "required": ["to"]}
BY = {
    "type": "object",
    "properties": {"by": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["by"],
}
NEST: dict[str, Any] = {
    "type": "object",
    "properties": {"in": {"$ref": "#"}, "n": {"$ref": "#/properties/m/items"}},
}
BRANCHING: dict[str, tuple[dict[str, Any], Any]] = {
    "anyOf": (
        {"anyOf": [TO, BY]},
        lambda found: found.get("to") in ("left", "90") or found["by"] in range(10),
    ),
    "oneOf": ({"type": "object", "oneOf": [TO, BY]}, lambda found: len(found) == 1),
    "allOf of anyOf": ({"allOf": [{"anyOf": [TO]}, BY]}, lambda found: found.keys() == {"to", "by"}),
    "references": (
        {"anyOf": [{"$ref": "#/definitions/t"}], "definitions": {"t": TO}},
        lambda found: found["to"] in ("left", "90"),
    ),
    "anywhere": (
        {**NEST, "required": ["n"], "properties": {**NEST["properties"], "m": {"items": {"enum": [4, 7]}}}},
        lambda found: found["n"] in (4, 7),
    ),
    "required, by pattern": (
        {"patternProperties": {"^k_": {"type": "boolean"}}, "required": ["k_1"]},
        lambda found: isinstance(found["k_1"], bool),
    ),
    "required, of any name": (
        {"additionalProperties": {"enum": ["x", "7"]}, "required": ["whatever"]},
        lambda found: found["whatever"] in ("x", "7"),
    ),
}


@pytest.mark.parametrize("kind", few(BRANCHING, ["anyOf", "references"]))
def test_a_forced_call_follows_a_schema_that_branches_at_its_root(client: TestClient, kind: str) -> None:
    parameters, holds = BRANCHING[kind]
    tools = [{"type": "function", "function": {"name": "move", "parameters": parameters}}]
    for seed in range(4):
        answer = ask(
            client, seed, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=400
        )
        found = json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"])
        assert holds(found), found


@pytest.mark.parametrize("name", ["patternProperties", "additionalProperties"])
def test_a_forced_call_may_name_its_own_arguments(client: TestClient, name: str) -> None:
    schema = {"type": "integer", "maximum": 9, "minimum": 0}
    parameters = {name: {"^k[a-z]{12}$": schema} if name == "patternProperties" else schema}
    tools = [{"type": "function", "function": {"name": "move", "parameters": parameters}}]
    found = []
    for seed in range(6):
        answer = ask(
            client, seed, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=400
        )
        found.append(answer["message"]["tool_calls"][0]["function"]["arguments"])
    assert any(one != "{}" for one in found)


def test_a_forced_call_holds_to_thousands_of_values(client: TestClient) -> None:
    values = [f"{number}. \\ a/b [x]*\nü" for number in range(2500)]
    tools = [tool("pick", {"which": {"enum": values}}, ["which"])]
    answer = ask(client, 1, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=400)
    assert json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"])["which"] in values


@pytest.mark.parametrize(
    "num_prompts", [pytest.param(5, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)]
)
def test_both_hold_on_random_prompts(client: TestClient, num_prompts: int) -> None:
    for seed in range(100, 100 + num_prompts):
        check_json(client, seed)
        check_call(client, seed)


@pytest.mark.slow
def test_several_calls_may_be_made_unless_one_is_wished(client: TestClient) -> None:
    counts = set()
    for seed in range(12):
        answer = ask(client, seed, tools=TOOLS, tool_choice="required")
        assert answer["finish_reason"] == "tool_calls"
        counts.add(len(answer["message"]["tool_calls"]))
    assert max(counts) > 1


def test_no_call_is_made_where_none_may_be(client: TestClient, tokenizer: Tokenizer) -> None:
    """The weights are random, and made to want calls: only the grammar keeps them from it."""
    bias = {str(tokenizer.token_id(tag)): 100.0 for tag in ("<tool_call>", "<arg_key>", "</tool_call>")}
    for seed in range(4):
        fields = {"tools": TOOLS, "logit_bias": bias, "max_tokens": 20}
        assert "<tool_call>" in str(ask(client, seed, logit_bias=bias, max_tokens=20))
        answer = ask(client, seed, tool_choice="none", **fields)
        assert "tool_calls" not in answer["message"]
        assert "<tool_call>" not in answer["message"]["content"]
        schema = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}
        answer = ask(client, seed, tool_choice="none", response_format=schema, **fields)
        assert json.loads(answer["message"]["content"]) in (1, 2)


@pytest.mark.parametrize("ending", ["<|user|>", "<|observation|>", "<|endoftext|>"])
def test_a_model_that_would_end_in_its_thought_closes_it(
    client: TestClient, tokenizer: Tokenizer, ending: str
) -> None:
    for seed in range(3):
        bias = {str(tokenizer.token_id(ending)): 100.0}
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "seed": seed,
            "logit_bias": bias,
            "max_tokens": 9,
        }
        body["temperature"] = 0
        response = client.post("/v1/chat/completions", json=body).json()
        assert response["choices"][0]["finish_reason"] == "stop"
        assert response["usage"]["completion_tokens"] >= 2, "the end of the thought, and of the turn"


@pytest.mark.slow
def test_any_object_is_an_object(client: TestClient) -> None:
    for seed in range(4):
        choice = ask(client, seed, response_format={"type": "json_object"}, max_tokens=400)
        content = choice["message"]["content"]
        assert content.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(content), dict)


def test_a_grammar_of_the_clients_own_holds(client: TestClient) -> None:
    format_ = {"type": "grammar", "grammar": 'start: "yes" | "no"'}
    answers = {ask(client, seed, response_format=format_)["message"]["content"] for seed in range(8)}
    assert answers == {"yes", "no"}


@pytest.mark.parametrize(
    "pattern",
    few(
        [r"[a-f]{2}/(x|y)\d{1,3}", "a\nb", r"\/\d\\/", r"\"'\{é\}?", "(?i)yes|no"],
        [r"[a-f]{2}/(x|y)\d{1,3}", "(?i)yes|no"],
    ),
)
def test_a_pattern_holds(client: TestClient, pattern: str) -> None:
    for seed in range(3):
        choice = ask(client, seed, response_format={"type": "regex", "regex": pattern})
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["message"]["content"])


@pytest.mark.slow
def test_a_schema_and_tools_leave_the_choice_between_both(client: TestClient) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}
    answers = [ask(client, seed, response_format=schema, tools=TOOLS)["message"] for seed in range(16)]
    assert all(answer.get("tool_calls") or json.loads(answer["content"]) in (1, 2) for answer in answers)
    assert {bool(answer.get("tool_calls")) for answer in answers} == {True, False}


@pytest.mark.parametrize("max_tokens", few([1, 2, 17], [2]))
def test_a_thought_ends_at_its_limit_and_the_grammar_begins(client: TestClient, max_tokens: int) -> None:
    reasoning = {"max_tokens": max_tokens}
    check_json(client, max_tokens, reasoning=reasoning)
    check_call(client, max_tokens, reasoning=reasoning)


def test_a_thought_of_the_full_length_is_counted(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "reasoning": {"max_tokens": 9}, "max_tokens": 40}
    body |= {"logit_bias": {str(token_id): -100 for token_id in range(300, 320)}}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 9
    assert usage["completion_tokens"] == 40


def test_log_probabilities_and_penalties_go_with_a_grammar(client: TestClient) -> None:
    check_json(client, 1, logprobs=True, top_logprobs=3, repetition_penalty=1.3, presence_penalty=1, top_k=5)
    check_json(client, 2, temperature=0)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"if": {}}}}, "if"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "wizard"}, "wizard"),
        (5, "schema"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_by_its_keyword(
    client: TestClient, schema: Any, keyword: str
) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert keyword in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": "required", "tools": []}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": TOOLS}, "'g'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "python"}}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "grammar"),
        ({"response_format": {"type": "regex"}}, "regex"),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": "a(?=b)"}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": "start: ("}}, "grammar"),
        ({"tool_choice": "required", "tools": [tool("f", {"a": {"$ref": "#/nowhere"}}, [])]}, "'#/nowhere'"),
        (
            {"tool_choice": "required", "tools": [tool("f", {"a": {"$ref": "other.json"}}, [])]},
            "'other.json'",
        ),
        (
            {"tool_choice": "required", "tools": [tool("f", {"a": {"type": "object", "not": {}}}, [])]},
            "not",
        ),
    ],
)
def test_what_asks_for_the_impossible_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], words: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_grammar_that_takes_long_to_read_keeps_nobody_else_waiting(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_matcher, may_go_on = Grammars.make_matcher, threading.Event()

    def slowly(grammars: Grammars, grammar: str, stop_token_ids: frozenset[int], num_bytes: int) -> Matcher:
        assert may_go_on.wait(30)
        return make_matcher(grammars, grammar, stop_token_ids, num_bytes)

    async def last_of(engine: LoopEngine, request: Generate) -> RequestEvent:
        return [event async for event in engine.generate(request)][-1]

    async def scenario(engine: LoopEngine) -> None:
        stops = frozenset([VOCAB - 1])
        bound = Generate("bound", (1, 2, 3), 4, stop_token_ids=stops, grammar='start: "aaaa"')
        waiting = asyncio.ensure_future(last_of(engine, bound))
        left = asyncio.ensure_future(last_of(engine, replace(bound, request_id="left")))
        await asyncio.sleep(0.05)
        left.cancel()
        free = await asyncio.wait_for(last_of(engine, Generate("free", (1, 2, 3), 4)), 10)
        assert isinstance(free, Finished)
        assert not waiting.done()
        may_go_on.set()
        assert isinstance(await asyncio.wait_for(waiting, 10), Finished)
        wrong = await last_of(engine, replace(bound, request_id="wrong", grammar="start: what"))
        assert isinstance(wrong, Failed)
        assert (wrong.kind, caplog.records) == ("request", []), "the fault is not ours"

    monkeypatch.setattr(Grammars, "make_matcher", slowly)
    with random_engine(tokenizer_folder) as engine:
        try:
            asyncio.run(scenario(engine))
        finally:
            may_go_on.set()
