"""What type a tool argument has: GLM writes values without one, so the tool's schema decides.

`ArgumentType` is the answer for one argument, `ArgumentTypes` finds it. Pure; schemas come from clients and
are believed nothing: whatever makes no sense allows every type.
"""

import json
import math
import re
from typing import Any

import pydantic_core

from server.glm.finite import all_finite
from server.glm.schemas.schema_parts import (
    OTHERS,
    Document,
    Schema,
    conditions,
    reference_of,
    resolve,
    schema_of,
    variants,
)

Types = frozenset[str]
ALL: Types = frozenset(["string", "number", "integer", "boolean", "null", "object", "array"])
# Deeper than any schema that people write; a chain of references must not exhaust the stack.
MAX_DEPTH = 64
# References that are followed for one function.
MAX_REFERENCES = 1000

BLANKS = " \t\n\r"
NUMBER_SO_FAR = re.compile(r"[-+0-9.eE]*[ \t\n\r]*")


class ArgumentType:
    """The types that one argument may have."""

    def __init__(self, types: Types = ALL) -> None:
        self.types = types

    def to_json(self, raw: str) -> str:
        """The JSON of a complete value. A string stays as it is, to the last blank.

        Text that reads as JSON of another allowed type is that; a value that fits no allowed type is
        handed on as a string, for the caller to complain about.
        """
        value = _parse(raw)
        fits = value is not None and bool(_types_of(value[0]) & (self.types - {"string"}))
        return raw.strip(BLANKS) if fits else json.dumps(raw, ensure_ascii=False)

    def is_surely_text(self, start: str) -> bool:
        """Whether a value that begins like this can only be a string, so that it need not be waited for."""
        if "string" not in self.types:
            return False
        others = self.types - {"string"}
        head = start.lstrip(BLANKS)
        if not head or not others:
            return not others
        match head[0]:
            case "{":
                return "object" not in others
            case "[":
                return "array" not in others
            case char if char in "-0123456789":
                return others.isdisjoint({"integer", "number"}) or not NUMBER_SO_FAR.fullmatch(head)
            case _:
                words = ["null"] * ("null" in others) + ["true", "false"] * ("boolean" in others)
                return not any(word.startswith(head.rstrip(BLANKS)) for word in words)


class ArgumentTypes:
    """The arguments of one function, by the JSON schema of its parameters."""

    def __init__(self, parameters: Any) -> None:
        self._document = Document.of(parameters if isinstance(parameters, dict | Document) else {})
        self._by_reference: dict[str, Types] = {}
        self.variants = variants(self._document)

    def known_key(self, key: str) -> str:
        """The argument that is meant: the exact name, else the one without the blanks around it."""
        known = {name for variant in self.variants for name in variant["properties"]}
        return key.strip() if key not in known and key.strip() in known else key

    def of(self, key: str) -> ArgumentType:
        """The type of one argument, wherever the schema speaks of it."""
        types = self._of_key(self._document.root, key, 0, by_name=True)
        if types is None:
            types = self._of_key(self._document.root, key, 0, by_name=False)
        return ArgumentType(types or ALL)

    def _of_key(self, schema: Any, key: str, depth: int, by_name: bool) -> Types | None:
        """The types that a schema of objects allows one key; None where it says nothing of it.

        `by_name`: what is said of the key; otherwise what is said of keys that have no schema of their own.
        """
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return None

        def any_of(branches: list[Any]) -> Types | None:
            said = [self._of_key(branch, key, depth + 1, by_name) for branch in branches]
            found = [types for types in said if types is not None]
            return frozenset().union(*found) if found else None

        own = schema_of(schema, key) if by_name else _others(schema)
        all_said = [None if own is None else self.types_of(own)]
        if (reference := reference_of(schema)) is not None:
            all_said.append(any_of([resolve(self._document, reference)]))
        all_said += [any_of([branch]) for branch in _branches(schema, "allOf")]
        all_said += [any_of(_branches(schema, name)) for name in ("anyOf", "oneOf")]
        all_said += [any_of(alternatives) for alternatives in conditions(schema)]
        found = [types for types in all_said if types is not None]
        if not found:
            return None
        return frozenset.intersection(*found) or frozenset().union(*found)

    def types_of(self, schema: Any) -> Types:
        """The types that a part of the schema allows."""
        return self._allowed(schema, 0)

    def _allowed(self, schema: Any, depth: int) -> Types:
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return ALL
        types = _declared(schema)
        if (reference := reference_of(schema)) is not None:
            types &= self._referenced(reference, depth)
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list) and branches:
                types &= frozenset().union(*(self._allowed(branch, depth + 1) for branch in branches))
        if isinstance(branches := schema.get("allOf"), list):
            for branch in branches:
                types &= self._allowed(branch, depth + 1)
        if schema.get("nullable") is True:
            types |= {"null"}
        return types or ALL

    def _referenced(self, reference: str, depth: int) -> Types:
        if reference not in self._by_reference and len(self._by_reference) >= MAX_REFERENCES:
            return ALL
        if reference not in self._by_reference:
            self._by_reference[reference] = ALL  # what a reference to itself says
            self._by_reference[reference] = self._allowed(resolve(self._document, reference), depth + 1)
        return self._by_reference[reference]


def _others(schema: Schema) -> Any:
    return next((schema[name] for name in OTHERS if name in schema), None)


def _branches(schema: Schema, name: str) -> list[Any]:
    branches = schema.get(name)
    return branches if isinstance(branches, list) else []


def _declared(schema: dict[str, Any]) -> Types:
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    types = frozenset(name for name in names if isinstance(name, str)) & ALL
    if "number" in types:
        types |= {"integer"}
    if not types:
        implied = {"object": "properties" in schema, "array": "items" in schema}
        types = frozenset(name for name, is_implied in implied.items() if is_implied) or ALL
    values = schema.get("enum")
    if "const" in schema:
        values = [schema["const"]]
    if isinstance(values, list) and values:
        types &= frozenset().union(*map(_types_of, values))
    return types


def _types_of(value: Any) -> Types:
    """The types whose values include this one."""
    match value:
        case None:
            return frozenset(["null"])
        case bool():
            return frozenset(["boolean"])
        case int():
            return frozenset(["integer", "number"])
        case float():
            if not math.isfinite(value):
                return frozenset()
            return frozenset(["integer", "number"] if value.is_integer() else ["number"])
        case str():
            return frozenset(["string"])
        case list():
            return frozenset(["array"])
        case _:
            return frozenset(["object"])


def _parse(raw: str) -> tuple[Any] | None:
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError:
        return None
    return (value,) if all_finite(value) else None
