"""Grammars that would take a server down: each ends in an answer, in little time and memory."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from config.errors import RequestError
from config.plan import GRAMMAR_TRIAL_BYTES
from server.commands.checkpoint import POCKET
from server.glm.schemas.grammar_order import GrammarOrder, Tags
from server.glm.schemas.trial import Bounds, Exceeded, Vocabulary, attempt
from tests.grids import few

VOCABULARY = Vocabulary(POCKET, 4096, frozenset([0]))
QUICK = Bounds(0.3, GRAMMAR_TRIAL_BYTES)


def chain(keyword: str, length: int) -> dict[str, Any]:
    """References that double at each step."""
    steps: dict[str, Any] = {
        f"d{index}": {keyword: [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(length)
    }
    return {
        "$defs": steps | {f"d{length}": {"type": "object", "properties": {"a": {}}}},
        "$ref": "#/$defs/d0",
    }


def named(number: int, schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": schema for index in range(number)}}


SCHEMAS = {
    "a prime step": {"type": "integer", "multipleOf": 999_983},
    "a fine step": {"type": "number", "multipleOf": 0.000_123_457},
    "10,000 optional properties": named(10_000, {"type": "string"}),
    "3,000 patterns": named(3000, {"type": "string", "pattern": "^[a-z]{3,40}x+[0-9]{2,50}$"}),
    "100,000 values": {"enum": [f"value {index}" for index in range(100_000)]},
    "allOf twice": chain("allOf", 40),
    "anyOf twice": chain("anyOf", 40),
    "anchors": {
        "$defs": {f"a{index}": {"$anchor": f"a{index}", "type": "string"} for index in range(3000)},
        **named(3000, {"$ref": "#a2999"}),
    },
}
GRAMMARS = {
    "ambiguous": "start: e0\n"
    + "\n".join(
        f"e{one}: "
        + " | ".join(f'"{char}" e{(7 * one + other) % 120}' for other, char in enumerate("aaaabbbb"))
        for one in range(120)
    ),
    "a repetition of repetitions": 'start: (("a"{1,1000}){1,1000}){1,1000}\n',
    "an intersection": "start: A\nA: /.*a.{30}/ & /.*b.{30}/ & ~/.*c.{30}/\n",
}


def outcome(order: GrammarOrder, bounds: Bounds = QUICK) -> str:
    started_at = time.process_time()
    try:
        written = attempt(order, VOCABULARY, bounds)
    except RequestError as error:
        return f"refused: {error}"
    except Exceeded as error:
        return f"exceeded: {error}"
    finally:
        assert time.process_time() - started_at < 1, "the work is the child's"
    assert written.num_bytes <= bounds.num_bytes
    return "written"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("use", few(["content", "a tool", "an argument"], ["an argument"]))
def test_every_schema_ends_within_its_bounds(schema: dict[str, Any], use: str) -> None:
    order = GrammarOrder(Tags(), ("json", schema))
    if use != "content":
        parameters = schema if use == "a tool" else {"type": "object", "properties": {"x": schema}}
        order = GrammarOrder(Tags(), None, ({"name": "f", "parameters": parameters},), is_forced=True)
    outcome(order)


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_every_grammar_ends_within_its_bounds(grammar: str) -> None:
    outcome(GrammarOrder(Tags(), ("grammar", grammar)))


def test_what_takes_too_long_or_too_much_is_told_apart() -> None:
    """In a new process: in this one, what earlier tests have freed would do for a child."""
    command = [sys.executable, "-c", f"from {__name__} import tell_apart; tell_apart()"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[4], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr


def tell_apart() -> None:
    prime = GrammarOrder(Tags(), ("json", SCHEMAS["a prime step"]))
    assert outcome(prime, Bounds(0.05, 10**9)) == "exceeded: time"
    assert outcome(prime, Bounds(30, 4 * 10**6)) == "exceeded: memory"
    many = GrammarOrder(Tags(), ("json", SCHEMAS["100,000 values"]))
    assert outcome(many, Bounds(30, 2 * 10**6)) == "exceeded: memory"


def test_schemas_that_people_write_are_written_in_little_time() -> None:
    person = named(20, {"type": "string", "maxLength": 100}) | {"required": ["p1"]}
    for schema in (person, {"type": "array", "items": person}, {"anyOf": [person, named(100, {})]}):
        assert outcome(GrammarOrder(Tags(), ("json", schema)), Bounds(0.2, GRAMMAR_TRIAL_BYTES)) == "written"
    tools = tuple({"name": f"tool_{index}", "parameters": person} for index in range(60))
    assert outcome(GrammarOrder(Tags(), None, tools, is_forced=True)) == "written"


def test_what_is_wrong_is_told_with_its_field() -> None:
    order = GrammarOrder(Tags(), ("json", {"type": "object", "properties": {"a": {"not": {}}}}))
    with pytest.raises(RequestError) as refusal:
        attempt(order, VOCABULARY, QUICK)
    assert refusal.value.param == "response_format"
