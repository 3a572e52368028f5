"""Writes the grammar that an answer must follow, in llguidance's dialect of Lark.

A JSON schema binds the content; a forced tool choice binds the whole answer to calls in GLM's own format.
What llguidance cannot hold is refused here, before the engine hears of it. Called by the chat route.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from urllib.parse import quote

from llguidance import LLMatcher

from config.errors import RequestError
from server.glm.schemas.argument_types import ArgumentTypes
from server.glm.schemas.schema_parts import (
    ANCHORS,
    DATA,
    NAMED,
    REFERENCES,
    Document,
    Schema,
    dangling,
    reference_of,
    resolve,
    schema_of,
    walk,
)

# Enough for an indented line, and an end to it: a model could otherwise write blanks for ever.
GUIDANCE = {"whitespace_pattern": r"\n?[ ]{0,40}"}
# Where all of a tool's schema stands beside the part of it that one argument follows.
ALL_OF_IT = "all of the parameters"
# String formats that llguidance enforces; any other is an annotation.
FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"]
)
ANY_KEY = r"/[^<>\s]{1,64}/"

# llguidance takes 2,000 at one place of a rule, and any number within a word.
MAX_ALTERNATIVES = 1000

# Lark ends a pattern at a slash or at the end of the line.
IN_LARK = {"/": r"\/", "\n": r"\n"}

Rules = dict[str, str]


class HasTags(Protocol):
    """A vocabulary, of which a grammar needs the tags only."""

    def token_id(self, text: str) -> int | None:
        """The id of a token that is exactly this text."""


def json_rule(schema: Any) -> str:
    """A rule for JSON of this schema."""
    if isinstance(schema, dict):
        schema = _enforceable(schema) | {"x-guidance": GUIDANCE}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def regex_rule(pattern: str) -> str:
    """A rule for text that matches a pattern (of Rust's regex syntax) as a whole."""
    escaped = re.sub(r"\\.|/|\n", lambda found: IN_LARK.get(found.group(), found.group()), pattern)
    return f"/{escaped}/"


def text_rules(tokenizer: HasTags) -> Rules:
    """Rules of an answer that makes no calls: any text. A tag that is a token is no text to llguidance."""
    is_token = tokenizer.token_id("<tool_call>") is not None
    without = "" if is_token else " & ~/(?s:.*)<tool_call>(?s:.*)/"
    return {"start": "TEXT", "TEXT": "/(?s:.*)/" + without}


def make_grammar(rules: Rules) -> str:
    """The text of a grammar whose first rule is `start`."""
    return "\n".join(f"{name}: {body}" for name, body in rules.items()) + "\n"


def check_grammar(grammar: str, param: str) -> None:
    """Raise RequestError, with the keyword that is to blame, where the grammar cannot be held."""
    fault = LLMatcher.validate_grammar(grammar)
    if fault:
        raise RequestError(f"{param} cannot be enforced: {' '.join(fault.split())[:300]}", param=param)


class CallGrammar:
    """The rules of tool calls. A vocabulary without the tags gets them by their text."""

    def __init__(self, tokenizer: HasTags, functions: Sequence[dict[str, Any]], is_parallel: bool) -> None:
        self._tokenizer = tokenizer
        self._functions = functions
        self._is_parallel = is_parallel

    def rules(self) -> Rules:
        """Rules of which `calls` is the first."""
        has_tags = self._tokenizer.token_id("<arg_value>") is not None
        names = [f"call_{index}" for index in range(len(self._functions))]
        rules = {"calls": "call+" if self._is_parallel else "call", "call": " | ".join(names)}
        for index, function in enumerate(self._functions):
            rules |= self._call_rules(f"call_{index}", function)
        # With tags by their text, a value must not hold what would end it.
        return rules | {"text": "TEXT", "TEXT": "/(?s:.*)/" if has_tags else "/[^<]*/"}

    def _call_rules(self, name: str, function: dict[str, Any]) -> Rules:
        document = Document.of(function.get("parameters"))
        if (reference := dangling(document)) is not None:
            message = (
                f"tools: {function['name'][:40]!r} cannot be enforced: $ref {reference[:100]!r} leads nowhere"
            )
            raise RequestError(message, param="tools")
        types, bodies = ArgumentTypes(document), []
        rules: Rules = {}
        for number, variant in enumerate(types.variants):
            body = ""
            for key, value, mark in _arguments(types, document, variant):
                rules[f"{name}_{len(rules)}"] = self._argument(key, value)
                body += f" {name}_{len(rules) - 1}{mark}"
            rules[f"{name}_v{number}"] = body.strip() or '""'
            bodies.append(f"{name}_v{number}")
        start, end = self._tag("<tool_call>"), self._tag("</tool_call>")
        return {name: f"{start} {_quoted(function['name'])} ({' | '.join(bodies)}) {end}"} | rules

    def _argument(self, key: str, value: str) -> str:
        parts = [self._tag("<arg_key>"), key, self._tag("</arg_key>")]
        return " ".join([*parts, self._tag("<arg_value>"), value, self._tag("</arg_value>")])

    def _tag(self, text: str) -> str:
        token_id = self._tokenizer.token_id(text)
        return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _arguments(types: ArgumentTypes, document: Document, variant: Schema) -> Iterator[tuple[str, str, str]]:
    """Key, value and how often, for each argument of a variant: those it names, then those of any name."""
    required, others = variant["required"], variant.get("additionalProperties", False)
    for key, schema in variant["properties"].items():
        yield _quoted(key), _value(types, document, schema), "" if key in required else "?"
    for key in dict.fromkeys(name for name in required if isinstance(name, str)):
        if key not in variant["properties"]:
            schema = schema_of(variant, key)
            yield _quoted(key), _value(types, document, others if schema is None else schema), ""
    for pattern, schema in variant.get("patternProperties", {}).items():
        yield _key_like(pattern), _value(types, document, schema), "*"
    if others is True or isinstance(others, dict):
        is_empty = len(required) < variant.get("minProperties", 0) and not variant["properties"]
        yield ANY_KEY, _value(types, document, others), "+" if is_empty else "*"


def _key_like(pattern: str) -> str:
    """A key that a pattern is found in; as in a schema it may begin and end anywhere."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[start : len(pattern) - end]
    return regex_rule(f"{'' if start else '[^<>]{0,32}'}({inner}){'' if end else '[^<>]{0,32}'}")


def _value(types: ArgumentTypes, document: Document, schema: Any) -> str:
    """How a value is written: JSON, unless it may be a string, which GLM writes without quotes."""
    if "string" not in types.types_of(schema):
        if any(reference_of(part) is not None for part in walk(schema)):
            schema = _moved(schema, document) | {"$defs": {ALL_OF_IT: _moved(document.root, document)}}
        return f"({json_rule(schema)})"
    choices = _choices(document, schema, set())
    written = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in choices or ()]
    if len(written) > MAX_ALTERNATIVES:
        return regex_rule("|".join(re.escape(one).replace("\\\n", "\n") for one in written))
    return f"({' | '.join(map(_quoted, written))})" if written else "text"


def _moved(value: Any, document: Document, is_named: bool = False) -> Any:
    """A part of a schema whose references lead to where all of it stands now."""
    if isinstance(value, list):
        return [_moved(one, document) for one in value]
    if not isinstance(value, dict):
        return value
    moved = {
        key: one if key in DATA and not is_named else _moved(one, document, key in NAMED and not is_named)
        for key, one in value.items()
        if is_named or key not in ("$id", "$recursiveAnchor", *ANCHORS, *REFERENCES)
    }
    reference = None if is_named else reference_of(value)
    if reference is not None and (steps := document.locate(reference)) is not None:
        moved["$ref"] = "/".join(["#", "$defs", *(quote(_escaped(step)) for step in (ALL_OF_IT, *steps))])
    return moved


def _escaped(step: str | int) -> str:
    return str(step).replace("~", "~0").replace("/", "~1")


def _enforceable(value: Any, is_named: bool = False) -> Any:
    """A schema without the formats that only say something to people."""
    if isinstance(value, list):
        return [_enforceable(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: one if key in DATA and not is_named else _enforceable(one, key in NAMED and not is_named)
        for key, one in value.items()
        if is_named or key != "format" or (isinstance(one, str) and one in FORMATS)
    }


def _choices(root: Document, schema: Any, seen: set[str]) -> list[Any] | None:
    """The values that a schema counts out; None where it leaves more. A reference is followed once."""
    if not isinstance(schema, dict):
        return None
    if (reference := reference_of(schema)) is not None:
        if reference in seen:
            return []
        seen.add(reference)
        return _choices(root, resolve(root, reference), seen)
    if "const" in schema:
        return [schema["const"]]
    if isinstance(values := schema.get("enum"), list):
        return values
    if schema.get("type") in ("null", "boolean"):
        return [None] if schema["type"] == "null" else [False, True]
    branches = schema.get("anyOf") or schema.get("oneOf")
    found = [_choices(root, branch, seen) for branch in branches] if isinstance(branches, list) else [None]
    return None if None in found else [value for one in found for value in one or ()]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
