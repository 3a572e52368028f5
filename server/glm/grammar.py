"""Writes the grammar that an answer must follow, in llguidance's dialect of Lark.

A JSON schema binds the content; a forced tool choice binds the whole answer to calls in GLM's own format.
What llguidance cannot hold is refused here, before the engine hears of it. Called by the chat route.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llguidance import LLMatcher

from config.errors import RequestError
from server.glm.argument_types import ArgumentTypes, flattened, resolve
from server.glm.tokenizer import Tokenizer

# Enough for an indented line, and an end to it: a model could otherwise write blanks for ever.
GUIDANCE = {"whitespace_pattern": r"\n?[ ]{0,40}"}
DEFINITIONS = ("$defs", "definitions")

# Lark ends a pattern at a slash or at the end of the line.
IN_LARK = {"/": r"\/", "\n": r"\n"}

Rules = dict[str, str]


def json_rule(schema: Any) -> str:
    """A rule for JSON of this schema."""
    if isinstance(schema, dict):
        schema = schema | {"x-guidance": GUIDANCE}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def regex_rule(pattern: str) -> str:
    """A rule for text that matches a pattern (of Rust's regex syntax) as a whole."""
    escaped = re.sub(r"\\.|/|\n", lambda found: IN_LARK.get(found.group(), found.group()), pattern)
    return f"/{escaped}/"


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

    def __init__(self, tokenizer: Tokenizer, functions: Sequence[dict[str, Any]], is_parallel: bool) -> None:
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
        schema = flattened(function.get("parameters"))
        properties, required = schema.get("properties"), schema.get("required")
        arguments, rules = "", {}
        for index, key in enumerate(properties if isinstance(properties, dict) else ()):
            rules[f"{name}_{index}"] = self._argument(schema, key)
            is_required = isinstance(required, list) and key in required
            arguments += f" {name}_{index}" + ("" if is_required else "?")
        start, end = self._tag("<tool_call>"), self._tag("</tool_call>")
        return {name: f"{start} {_quoted(function['name'])}{arguments} {end}"} | rules

    def _argument(self, schema: dict[str, Any], key: str) -> str:
        parts = [self._tag("<arg_key>"), _quoted(key), self._tag("</arg_key>")]
        return " ".join([*parts, self._tag("<arg_value>"), _value(schema, key), self._tag("</arg_value>")])

    def _tag(self, text: str) -> str:
        token_id = self._tokenizer.token_id(text)
        return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _value(root: dict[str, Any], key: str) -> str:
    """How a value is written: JSON, unless it may be a string, which GLM writes without quotes."""
    schema = root["properties"][key]
    if "string" not in ArgumentTypes(root).of(key).types:
        definitions = {name: root[name] for name in DEFINITIONS if name in root}
        return f"({json_rule(schema | definitions)})"
    choices = list(_choices(root, schema))
    return f"({' | '.join(choices)})" if choices else "text"


def _choices(root: dict[str, Any], schema: Any) -> Iterator[str]:
    """The values of an enum or const, as they are written."""
    if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        schema = resolve(root, reference)
    if isinstance(schema, dict):
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        for value in values if isinstance(values, list) else ():
            yield _quoted(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
