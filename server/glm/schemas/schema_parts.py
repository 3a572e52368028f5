"""Parts of a JSON schema: what a reference points to, and the objects that a schema of arguments may be.

Pure; schemas come from clients and are believed nothing.
"""

from collections.abc import Iterator
from itertools import islice, product
from typing import Any
from urllib.parse import unquote

from pydantic_core import SchemaError, SchemaValidator, core_schema

# Values in a schema that are no schemas themselves.
DATA = ("enum", "const", "default", "examples", "example")
MAX_VARIANTS = 64
MAX_DEPTH = 64
# Properties that are put together at most, and parts that are searched for an anchor: branches multiply, and
# a few hundred bytes of references could make them more than any computer's memory.
MAX_MERGED = 200_000
MAX_SEARCHED = 10_000

Schema = dict[str, Any]


def resolve(document: Any, reference: str) -> Any:
    """What a reference like #/$defs/Point or #anchor points to in its document; None if nothing."""
    own = document.get("$id") if isinstance(document, dict) else None
    if isinstance(own, str) and own:
        reference = reference.removeprefix(own.removesuffix("#")) or "#"
    if not reference.startswith("#"):
        return None
    name = unquote(reference[1:])
    if name and not name.startswith("/"):
        parts = islice(walk(document), MAX_SEARCHED)
        return next((part for part in parts if part.get("$anchor") == name), None)
    part = document
    for step in name.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and step.isascii() and step.isdigit() and int(step) < len(part):
            part = part[int(step)]
        elif isinstance(part, dict):
            part = part.get(step)
        else:
            return None
    return part


def walk(value: Any) -> Iterator[Schema]:
    """All objects in a schema that may be schemas."""
    if isinstance(value, dict):
        yield value
    parts = [one for key, one in value.items() if key not in DATA] if isinstance(value, dict) else value
    for part in parts if isinstance(parts, list) else ():
        yield from walk(part)


def dangling(document: Any) -> str | None:
    """The first reference that points to nothing, or is none."""
    for part in walk(document):
        reference = part.get("$ref")
        if reference is None or isinstance(reference, dict):  # a property may have that name
            continue
        if not isinstance(reference, str) or resolve(document, reference) is None:
            return str(reference)
    return None


def variants(document: Any) -> list[Schema]:
    """The objects that arguments may be: branches and references at the root are multiplied out.

    Each has `properties`, `required`, and perhaps `patternProperties` and `additionalProperties`.
    """
    return _Branches(document).of(document, 0) or [{"properties": {}, "required": []}]


def schema_of(variant: Schema, key: str) -> Any:
    """The schema of one argument in a variant that names it, or a pattern for it; else None."""
    if key in variant["properties"]:
        return variant["properties"][key]
    patterns = _object(variant, "patternProperties")
    return next((schema for pattern, schema in patterns.items() if _matches(pattern, key)), None)


def _matches(pattern: str, key: str) -> bool:
    """Whether a pattern is found in a key, in linear time; one that cannot be read matches nothing."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern)).isinstance_python(key)
    except SchemaError:
        return False


class _Branches:
    """The branches of one document, multiplied out until that becomes too much."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._num_merged = 0

    def of(self, schema: Any, depth: int) -> list[Schema]:
        """The objects that a schema allows."""
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._num_merged > MAX_MERGED:
            return []
        factors = [[_own(schema)]]
        if isinstance(reference := schema.get("$ref"), str):
            factors.append(self.of(resolve(self._document, reference), depth + 1))
        if isinstance(branches := schema.get("allOf"), list):
            factors += [self.of(branch, depth + 1) for branch in branches]
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list):
                factors.append([one for branch in branches for one in self.of(branch, depth + 1)])
        found: list[Schema] = [{"properties": {}, "required": []}]
        for factor in filter(None, factors):
            found = [self._merged(one, other) for one, other in islice(product(found, factor), MAX_VARIANTS)]
        return found

    def _merged(self, one: Schema, other: Schema) -> Schema:
        both = {**other, **one, "required": one["required"] + other["required"]}
        for name in ("properties", "patternProperties"):
            if name in one or name in other:
                own = _object(one, name)
                both[name] = own | {k: v for k, v in _object(other, name).items() if k not in own}
                self._num_merged += 1 + len(both[name])
        return both


def _own(schema: Schema) -> Schema:
    required = schema.get("required")
    own = {
        "properties": _object(schema, "properties"),
        "required": required if isinstance(required, list) else [],
    }
    if patterns := _object(schema, "patternProperties"):
        own["patternProperties"] = patterns
    if "additionalProperties" in schema:
        own["additionalProperties"] = schema["additionalProperties"]
    return own


def _object(schema: Schema, name: str) -> Schema:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
