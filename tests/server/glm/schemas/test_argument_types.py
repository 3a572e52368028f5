"""Which types a schema allows, and what becomes of a value."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.glm.schemas.argument_types import ALL, ArgumentType, ArgumentTypes

STRING = {"type": "string"}
OPTIONAL = {"anyOf": [STRING, {"type": "null"}]}
DEFINITIONS = {
    "$defs": {
        "Name": STRING,
        "Point": {"type": "object", "properties": {"x": {"type": "number"}}},
        "Alias": {"$ref": "#/$defs/Name"},
        "Loop": {"$ref": "#/$defs/Loop"},
        "Tree": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "array"}]},
        "a/b": {"type": "boolean"},
    }
}
CHAIN: dict[str, Any] = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}


def type_of(schema: Any, **root: Any) -> ArgumentType:
    return ArgumentTypes({"type": "object", "properties": {"a": schema}} | root).of("a")


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        (STRING, "string"),
        ({"type": ["string", "null"]}, "string null"),
        ({"type": "number"}, "number integer"),
        ({"type": "integer"}, "integer"),
        (OPTIONAL, "string null"),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "integer boolean"),
        ({"allOf": [{"type": ["string", "null"]}, STRING]}, "string"),
        ({"enum": ["1", "2"]}, "string"),
        ({"enum": [1, "a", None]}, "integer number string null"),
        ({"type": "string", "enum": ["1", None]}, "string"),
        ({"const": True}, "boolean"),
        ({"$ref": "#/$defs/Name"}, "string"),
        ({"$ref": "#/$defs/Alias"}, "string"),
        ({"$ref": "#/$defs/a~1b"}, "boolean"),
        ({"allOf": [{"$ref": "#/$defs/Point"}], "description": "d"}, "object"),
        ({"properties": {}}, "object"),
        ({"items": STRING}, "array"),
        ({"type": "string", "nullable": True}, "string null"),
    ],
)
def test_types_are_found_through_every_keyword(schema: Any, types: str) -> None:
    assert type_of(schema, **DEFINITIONS).types == set(types.split())


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/Person"},
        {"allOf": [{"$ref": "#/$defs/Person"}, {"properties": {"age": {"type": "integer"}}}, 5]},
        {"$ref": "#/$defs/Other", "properties": {"name": STRING}},
        {"$ref": "#/$defs/Round", "allOf": [{"properties": {"name": STRING}}]},
    ],
)
def test_arguments_may_be_declared_behind_a_reference_at_the_top(parameters: dict[str, Any]) -> None:
    definitions = {
        "Person": {"type": "object", "properties": {"name": STRING}, "required": ["name"]},
        "Other": {"$ref": "#/$defs/Person"},
        "Round": {"$ref": "#/$defs/Round"},
    }
    types = ArgumentTypes(parameters | {"$defs": definitions})
    assert types.of("name").to_json("10001") == '"10001"'
    assert types.of("age").to_json("10001") == "10001"
    assert types.known_key(" name ") == "name"


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        {},
        [],
        "string",
        {"type": "wizard"},
        {"type": 5},
        {"type": {}},
        {"type": [[]]},
        {"enum": []},
        {"anyOf": []},
        {"anyOf": 3},
        {"$ref": 5},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "http://example.com/schema"},
        {"$ref": "#/$defs/Loop"},
        {"$ref": "#/$defs/Tree"},
        {"allOf": [STRING, {"type": "null"}]},
        {"$ref": "#/$defs/0"},
    ],
    ids=lambda schema: repr(schema)[:40],
)
def test_what_makes_no_sense_allows_everything(schema: Any) -> None:
    definitions = {"$defs": DEFINITIONS["$defs"] | CHAIN}
    assert type_of(schema, **definitions).types == ALL


def test_branches_that_refer_to_each_other_do_not_multiply() -> None:
    """Resolved naively these would be 2 to the power of 60 branches."""
    defs: dict[str, Any] = {
        str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}, {"$ref": f"#/$defs/{i + 1}"}]} for i in range(60)
    }
    defs["60"] = STRING
    assert "string" in type_of({"$ref": "#/$defs/0"}, **{"$defs": defs}).types


def test_keys_beyond_the_properties_have_the_type_of_additional_properties() -> None:
    arguments = ArgumentTypes({"additionalProperties": STRING})
    assert arguments.of("any").to_json("5") == '"5"'


LOOKALIKES = ["10001", "007", "1e5", "true", "null", "[1]", '{"a": 1}', '"x"', " 5 ", "NaN", "-", ""]


@pytest.mark.parametrize("raw", LOOKALIKES)
def test_a_string_that_looks_like_something_else_stays_a_string(raw: str) -> None:
    for schema in (STRING, {"enum": [raw]}, {"const": raw}, {"allOf": [STRING]}):
        assert json.loads(type_of(schema).to_json(raw)) == raw


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        (OPTIONAL, "null", None),
        (OPTIONAL, "10001", "10001"),
        (OPTIONAL, '"quoted"', '"quoted"'),
        (OPTIONAL, "  indented\n", "  indented\n"),
        ({"type": "integer"}, " 12 ", 12),
        ({"type": "integer"}, "5.0", 5.0),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "123abc", "123abc"),
        ({"type": "integer"}, "<10", "<10"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "12345678901234567890", 12345678901234567890),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "Infinity", "Infinity"),
        ({"type": "boolean"}, "True", "True"),
        ({"type": "boolean"}, "false", False),
        ({"type": "array"}, "{1,2}", "{1,2}"),
        ({"type": "array"}, "['a']", "['a']"),
        ({"type": "array"}, '[1, "ä"]', [1, "ä"]),
        ({"type": "object"}, '{"a": ', '{"a": '),
        ({"type": "object"}, "[" * 1000 + "]" * 1000, "[" * 1000 + "]" * 1000),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5 apples", "5 apples"),
        ({"enum": [1, 2]}, "2", 2),
        (None, "5", 5),
        (None, '{"a": [null]}', {"a": [None]}),
        (None, '"x"', '"x"'),
        (None, "plain", "plain"),
        (None, "", ""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_values_are_coerced_by_the_schema_and_never_guessed(schema: Any, raw: str, value: Any) -> None:
    result = json.loads(type_of(schema).to_json(raw))
    assert (result, type(result)) == (value, type(value))


TYPES = st.frozensets(st.sampled_from(sorted(ALL)), min_size=1)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
RAWS = (
    st.text() | JSONS.map(lambda value: json.dumps(value, ensure_ascii=False)) | st.sampled_from(LOOKALIKES)
)
BLANKS = st.text(" \t\n\r", max_size=2)


@given(TYPES, RAWS, BLANKS, BLANKS)
def test_what_is_sent_early_as_text_is_text_in_the_end(
    types: frozenset[str], raw: str, before: str, after: str
) -> None:
    kind, raw = ArgumentType(types), before + raw + after
    whole = json.loads(kind.to_json(raw))
    if any(kind.is_surely_text(raw[:end]) for end in range(len(raw) + 1)):
        assert whole == raw


@given(JSONS)
def test_json_of_any_kind_survives_where_no_string_is_allowed(value: Any) -> None:
    kind = ArgumentType(ALL - {"string"})
    raw = json.dumps(value, ensure_ascii=False)
    assert json.loads(kind.to_json(raw)) == (raw if isinstance(value, str) else value)


@pytest.mark.parametrize("raw", ["1e999", "[0, -1e999]", '{"a": {"b": 1e400}}', "[NaN]"])
def test_numbers_that_json_does_not_have_are_text(raw: str) -> None:
    assert ArgumentType().to_json(raw) == json.dumps(raw)
