"""Schemas that branch at the root, references to anywhere, and what is only an annotation."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from config.errors import RequestError
from server.glm.schemas.answer_grammar import CallGrammar, json_rule, make_grammar
from server.glm.schemas.argument_types import ArgumentTypes
from server.glm.schemas.schema_parts import dangling, resolve
from server.glm.tokenizer import Tokenizer

STRING, NUMBER = {"type": "string"}, {"type": "integer"}
ZIP = {"type": "object", "properties": {"zip": STRING}, "required": ["zip"]}
CITY = {"type": "object", "properties": {"city": STRING, "n": NUMBER}, "required": ["city"]}


@pytest.mark.parametrize(
    ("schema", "key", "value", "expected"),
    [
        ({"anyOf": [ZIP, CITY]}, "zip", "90210", "90210"),
        ({"oneOf": [CITY, ZIP]}, "zip", "90210", "90210"),
        ({"oneOf": [CITY, ZIP]}, "n", "5", 5),
        (
            {"type": "object", "properties": {"a": STRING}, "anyOf": [ZIP, {"required": ["a"]}]},
            "zip",
            "1",
            "1",
        ),
        ({"allOf": [{"anyOf": [ZIP, CITY]}, {"properties": {"k": STRING}}]}, "k", "true", "true"),
        ({"anyOf": [{"$ref": "#/$defs/z"}, CITY], "$defs": {"z": ZIP}}, "zip", "0", "0"),
        ({"patternProperties": {"^s_": STRING, "^n_": NUMBER}}, "s_1", "12", "12"),
        ({"patternProperties": {"^s_": STRING, "^n_": NUMBER}}, "n_1", "12", 12),
        ({"additionalProperties": STRING}, "whatever", "null", "null"),
        ({"additionalProperties": {"type": "boolean"}}, "whatever", "true", True),
        (
            {"properties": {"a": {"$ref": "#/properties/b/anyOf/1"}, "b": {"anyOf": [NUMBER, STRING]}}},
            "a",
            "7",
            "7",
        ),
        (
            {"properties": {"a": {"$ref": "#text"}}, "x": [{"$anchor": "text", "type": "string"}]},
            "a",
            "7",
            "7",
        ),
        ({"properties": {"a": {"$ref": "#/$defs/a%20b~1c"}}, "$defs": {"a b/c": STRING}}, "a", "7", "7"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "a", "7", 7),
        ({"patternProperties": {"(": STRING, "(?=x)": STRING}}, "a", "7", 7),
    ],
)
def test_types_are_found_wherever_they_stand(schema: Any, key: str, value: str, expected: Any) -> None:
    assert json.loads(ArgumentTypes(schema).of(key).to_json(value)) == expected


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/none", "other.json", "http://x.y/z", "#nowhere", "#/properties/a/9", 5, [], "", "x#/$defs/q"],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_reference_that_leads_nowhere_is_named(tokenizer: Tokenizer, reference: Any, depth: int) -> None:
    inner = {"$ref": reference}
    parameters = {
        "type": "object",
        "properties": {"a": {"items": inner} if depth else inner},
        "$defs": {"q": {}},
    }
    assert dangling(parameters) == str(reference)
    with pytest.raises(RequestError, match=r"\$ref") as raised:
        CallGrammar(tokenizer, [{"name": "f", "parameters": parameters}], True).rules()
    assert str(reference) in str(raised.value)


@pytest.mark.parametrize(
    "data", [{"enum": [{"$ref": "x"}]}, {"default": {"$ref": 5}}, {"properties": {"$ref": STRING}}]
)
def test_what_is_no_reference_is_none(data: Any) -> None:
    assert dangling({"properties": {"a": data}}) is None


def test_a_document_may_name_itself() -> None:
    document = {"$id": "https://x.y/z", "$defs": {"a": STRING}}
    assert resolve(document, "https://x.y/z#/$defs/a") == STRING
    assert resolve(document, "#") == document


@pytest.mark.parametrize("format_", ["sonnet", "int64", "uri-template", "idn-email", "regex", "json-pointer"])
def test_an_unknown_format_is_an_annotation(format_: str) -> None:
    schemas: list[Any] = [
        {"type": "string", "format": format_},
        {"properties": {"format": {"format": format_}}},
    ]
    for schema in schemas:
        assert not LLMatcher.validate_grammar(make_grammar({"start": json_rule(schema)}))
    kept = json_rule({"enum": [{"format": format_}], "properties": {"format": STRING}})
    assert format_ in kept
    assert '"properties": {"format"' in kept
