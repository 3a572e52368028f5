"""Writes the grammar that an answer must follow, in llguidance's dialect of Lark.

A JSON schema binds the content; a forced tool choice binds the whole answer to calls in GLM's own format.
What llguidance cannot hold is refused here, before the engine hears of it. Called by the chat route.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from config.errors import RequestError
from server.glm.argument_types import ArgumentTypes, flattened, resolve
from server.glm.tokenizer import Tokenizer

# Enough for an indented line, and an end to it: a model could otherwise write blanks for ever.
GUIDANCE = {"whitespace_pattern": r"\n?[ ]{0,40}"}
DEFINITIONS = ("$defs", "definitions")

# llguidance takes 2,000 at one place of a rule, and any number within a word.
MAX_ALTERNATIVES = 1000

# A reference to all of a schema, as it stands in a rule.
WHOLE = '"$ref": "#"'

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


def text_rules(tokenizer: Tokenizer) -> Rules:
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
        rule = json_rule(schema | definitions)
        if WHOLE in rule:  # there is another whole here, and it would follow itself for ever
            raise RequestError(
                f"tools: the reference to '#' in {key[:40]!r} cannot be enforced", param="tools"
            )
        return f"({rule})"
    choices = _choices(root, schema, set())
    written = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in choices or ()]
    if len(written) > MAX_ALTERNATIVES:
        return regex_rule("|".join(re.escape(one).replace("\\\n", "\n") for one in written))
    return f"({' | '.join(map(_quoted, written))})" if written else "text"


def _choices(root: dict[str, Any], schema: Any, seen: set[str]) -> list[Any] | None:
    """The values that a schema counts out; None where it leaves more. A reference is followed once."""
    if not isinstance(schema, dict):
        return None
    if isinstance(reference := schema.get("$ref"), str):
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
