"""Schemas that branch at the root, references to anywhere, and what is only an annotation."""

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from config.errors import RequestError
from server.glm.schemas.answer_grammar import CallGrammar, json_rule, make_grammar
from server.glm.schemas.argument_types import ArgumentTypes
from server.glm.schemas.schema_parts import Document, dangling, resolve
from server.glm.tokenizer import Tokenizer

STRING, NUMBER = {"type": "string"}, {"type": "integer"}
DEFS = {"$defs": {"t": STRING}}
ANCHORED = {"$dynamicAnchor": "t", "type": "string"}
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
        ({"if": {"required": ["k"]}, "then": ZIP}, "zip", "90210", "90210"),
        ({"if": {"required": ["k"]}, "then": CITY, "else": ZIP}, "zip", "90210", "90210"),
        ({"if": ZIP, "else": CITY}, "zip", "90210", "90210"),
        ({"dependentSchemas": {"k": ZIP}}, "zip", "90210", "90210"),
        ({"dependencies": {"k": ZIP, "l": ["k"]}}, "zip", "90210", "90210"),
        ({"unevaluatedProperties": STRING}, "whatever", "7", "7"),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"a": STRING}}]}, "a", "7", "7"),
        ({"properties": {"a": True}, "allOf": [{"properties": {"a": STRING}}]}, "a", "7", "7"),
        ({"anyOf": [{"properties": {f"k{n}": STRING}} for n in range(1000)]}, "k999", "7", "7"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"{c}{n}": STRING}} for n in range(9)]} for c in "abcd"]},
            "d8",
            "7",
            "7",
        ),
        ({"properties": {"a": {"$dynamicRef": "#t"}}, "$defs": {"t": ANCHORED}}, "a", "7", "7"),
        (
            {"$id": "https://x/y", "properties": {"a": {"$ref": "y#/$defs/t"}}, "$defs": {"t": STRING}},
            "a",
            "7",
            "7",
        ),
        (
            {"$id": "urn:x:y", "properties": {"a": {"$ref": "#/$defs/t"}}, "$defs": {"t": STRING}},
            "a",
            "7",
            "7",
        ),
        (
            {"properties": {"a": {"$ref": "https://x/t"}}, "$defs": {"t": {"$id": "https://x/t"} | STRING}},
            "a",
            "7",
            "7",
        ),
        (
            {
                "$id": "https://x/root",
                "properties": {"a": {"$ref": "/t#/$defs/u"}},
                "$defs": {"t": {"$id": "/t", "$defs": {"u": STRING}}},
            },
            "a",
            "7",
            "7",
        ),
    ],
)
def test_types_are_found_wherever_they_stand(schema: Any, key: str, value: str, expected: Any) -> None:
    assert json.loads(ArgumentTypes(schema).of(key).to_json(value)) == expected


@pytest.mark.parametrize(
    "reference",
    [
        "#/$defs/none",
        "other.json",
        "http://x.y/z",
        "#nowhere",
        "#/properties/a/9",
        5,
        [],
        "",
        "x#/$defs/q",
        None,
        {"a": 1},
        True,
        "http://[",
        "urn:a:b",
        "#/%zz",
        "$defs/q",
        "/q",
    ],
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


@pytest.mark.parametrize("format_", [5, None, ["date"], "", {"a": 1}, True])
def test_a_format_that_is_no_word_is_an_annotation(format_: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": format_}}}
    assert not LLMatcher.validate_grammar(make_grammar({"start": json_rule(schema)}))


def test_thousands_of_anchors_are_looked_up_in_one_table() -> None:
    names = [f"a{index}" for index in range(3000)]
    document = Document(
        {
            "properties": {name: {"$ref": f"#{name}"} for name in names},
            "$defs": {name: {"$anchor": name, "type": "string"} for name in names},
        }
    )
    assert dangling(document) is None
    assert all(resolve(document, f"#{name}")["$anchor"] == name for name in names)


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder: Path) -> LLTokenizer:
    return LLTokenizer((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))


def called(**arguments: Any) -> str:
    written = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()
    }
    pairs = (f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in written.items())
    return f"<tool_call>f{''.join(pairs)}</tool_call>"


AGAIN = {"$recursiveRef": "#"}
ENUM = {"enum": ["x", "y"]}
LIST = {"type": "array", "items": {"$ref": "#e"}}
A_OR_B = {"properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"]}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({"anyOf": [ZIP, CITY]}, [{"zip": "1"}, {"city": "x", "n": 5}], [{}, {"n": 5}]),
        (
            A_OR_B | {"if": {"properties": {"k": {"const": "a"}}}, "then": ZIP, "else": CITY},
            [{"k": "a", "zip": "1"}, {"k": "b", "city": "1"}],
            [{}, {"k": "a"}],
        ),
        ({"properties": {"k": STRING}, "dependentSchemas": {"k": ZIP}}, [{}, {"k": "1", "zip": "2"}], []),
        ({"additionalProperties": STRING, "minProperties": 1}, [{"a": "1"}, {"a": "1", "b": "2"}], [{}]),
        ({"unevaluatedProperties": STRING}, [{"a": "1"}], []),
        (
            {"properties": {"a": LIST}, "required": ["a"], "$defs": {"q": {"$anchor": "e"} | ENUM}},
            [{"a": ["x"]}],
            [{"a": ["z"]}],
        ),
        (
            {
                "properties": {"a": {"type": "array", "items": {"$ref": "https://x/e"}}},
                "required": ["a"],
                "$defs": {"a~b/c d": {"$id": "https://x/e"} | ENUM},
            },
            [{"a": ["x", "y"]}],
            [{"a": ["z"]}],
        ),
        (
            {
                "properties": {"a": {"type": "object", "properties": {"format": {"$dynamicRef": "#e"}}}},
                "required": ["a"],
                "$defs": {"q": {"$dynamicAnchor": "e"} | ENUM},
            },
            [{"a": {"format": "x"}}],
            [{"a": {"format": "z"}}],
        ),
        (
            {
                "$id": "https://x/r",
                "properties": {"t": {"type": "object", "properties": {"t": AGAIN, "v": ENUM}}},
                "required": ["t"],
            },
            [{"t": {"t": {"t": {"v": "y"}}}}],
            [{"t": {"t": {"t": {"v": "z"}}}}],
        ),
        ({"anyOf": [{"required": [f"k{n}"]} for n in range(200)]}, [{"k199": 1}], [{}]),
    ],
)  # fmt: skip
def test_a_forced_call_can_say_what_the_schema_allows_and_nothing_else(
    tokenizer: Tokenizer,
    vocabulary: LLTokenizer,
    parameters: dict[str, Any],
    good: list[dict[str, Any]],
    bad: list[dict[str, Any]],
) -> None:
    rules = CallGrammar(tokenizer, [{"name": "f", "parameters": parameters}], False).rules()
    grammar = make_grammar({"start": "calls"} | rules)
    for arguments, is_good in [*((one, True) for one in good), *((one, False) for one in bad)]:
        matcher = LLMatcher(vocabulary, grammar)
        token_ids = tokenizer.encode(called(**arguments))
        fits = matcher.validate_tokens(token_ids) == len(token_ids)
        assert fits == is_good, (arguments, matcher.get_error())
