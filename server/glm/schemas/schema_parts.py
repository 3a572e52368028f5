"""Parts of a JSON schema: what a reference points to, and the objects that a schema of arguments may be.

Pure; schemas come from clients and are believed nothing.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import islice, product
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from pydantic_core import SchemaError, SchemaValidator, core_schema

# Values in a schema that are no schemas themselves.
DATA = ("enum", "const", "default", "examples", "example")
# Objects whose keys are names of the client's, and whose values are schemas.
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
# What points to another part of a schema, in the words of all drafts.
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
ANCHORS = ("$anchor", "$dynamicAnchor")
MAX_VARIANTS = 256
MAX_DEPTH = 64
# Properties that are put together at most: branches multiply, and a few references could make
# them more than any computer's memory holds.
MAX_MERGED = 200_000
OTHERS = ("additionalProperties", "unevaluatedProperties")

Schema = dict[str, Any]


Steps = tuple[str | int, ...]


class Document:
    """A schema with what its references lead to. References are looked up in a table that is made once."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._base = urldefrag(_text(root, "$id"))[0]

    @classmethod
    def of(cls, value: Any) -> "Document":
        """The document of a schema, or the one that it is already."""
        return value if isinstance(value, cls) else cls(value)

    def locate(self, reference: str) -> Steps | None:
        """The way from the root to what #/$defs/Point, #anchor or an $id means; None if it leads nowhere."""
        address, hash_, name = _joined(self._base, reference).partition("#")
        start = () if address == self._base else self._places.get(address)
        if start is None or not (hash_ or address):
            return None
        name = unquote(name)
        if name and not name.startswith("/"):
            return self._places.get(f"#{name}")
        return _walked(self.at(start), start, name.split("/")[1:])

    def at(self, steps: Steps) -> Any:
        """What lies at the end of a way."""
        part = self.root
        for step in steps:
            part = part[step]
        return part

    @cached_property
    def _places(self) -> dict[str, Steps]:
        """The ways to all parts with an $id, and with a "#" before it to those with an anchor."""
        places: dict[str, Steps] = {}
        for steps, part in _parts(self.root):
            for name in ANCHORS:
                places.setdefault(f"#{_text(part, name)}", steps)
            if own := _text(part, "$id"):
                places.setdefault(urldefrag(_joined(self._base, own))[0], steps)
        return places


def resolve(document: Any, reference: str) -> Any:
    """What a reference points to in its document; None if nothing."""
    document = Document.of(document)
    steps = document.locate(reference)
    return None if steps is None else document.at(steps)


def _joined(base: str, reference: str) -> str:
    """The address that a reference means in a document with this address."""
    try:
        return base + reference if reference.startswith("#") else urljoin(base, reference)
    except ValueError:  # what looks like an address and is none
        return reference


def _walked(part: Any, start: Steps, names: list[str]) -> Steps | None:
    steps = start
    for step in (name.replace("~1", "/").replace("~0", "~") for name in names):
        if isinstance(part, list) and step.isascii() and step.isdigit() and int(step) < len(part):
            part, steps = part[int(step)], (*steps, int(step))
        elif isinstance(part, dict) and step in part:
            part, steps = part[step], (*steps, step)
        else:
            return None
    return steps


def _text(part: Any, name: str) -> str:
    value = part.get(name) if isinstance(part, dict) else None
    return value if isinstance(value, str) else ""


def walk(value: Any) -> Iterator[Schema]:
    """All objects in a schema that may be schemas."""
    return (part for _, part in _parts(value))


def _parts(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Schema]]:
    """The same, each with the way to it. An object of schemas by name is none itself."""
    waiting: list[tuple[Steps, Any, bool]] = [(steps, value, False)]
    while waiting:
        steps, part, is_named = waiting.pop()
        if isinstance(part, dict):
            if not is_named:
                yield steps, part
            children = [
                ((*steps, key), one, key in NAMED and not is_named)
                for key, one in part.items()
                if is_named or key not in DATA
            ]
            waiting += reversed(children)
        elif isinstance(part, list):
            waiting += reversed([((*steps, index), one, False) for index, one in enumerate(part)])


def reference_of(schema: Schema) -> str | None:
    """What a schema refers to, if it does."""
    return next((schema[name] for name in REFERENCES if isinstance(schema.get(name), str)), None)


def dangling(document: Any) -> str | None:
    """The first reference that points to nothing, or is none."""
    document = Document.of(document)
    for part in walk(document.root):
        for name in REFERENCES:
            if name not in part:
                continue
            reference = part[name]
            if not isinstance(reference, str) or document.locate(reference) is None:
                return str(reference)
    return None


def variants(document: Any) -> list[Schema]:
    """The objects that arguments may be: branches and references at the root are multiplied out.

    Each has `properties`, `required`, and perhaps `patternProperties` and `additionalProperties`.
    """
    document = Document.of(document)
    return _Branches(document).of(document.root, 0) or [{"properties": {}, "required": []}]


def schema_of(variant: Schema, key: str) -> Any:
    """The schema of one argument in a variant that names it, or a pattern for it; else None."""
    if key in (properties := _object(variant, "properties")):
        return properties[key]
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

    def __init__(self, document: Document) -> None:
        self._document = document
        self._num_merged = 0

    def of(self, schema: Any, depth: int) -> list[Schema]:
        """The objects that a schema allows."""
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._num_merged > MAX_MERGED:
            return []
        factors = [[_own(schema)]]
        if (reference := reference_of(schema)) is not None:
            factors.append(self.of(resolve(self._document, reference), depth + 1))
        if isinstance(branches := schema.get("allOf"), list):
            factors += [self.of(branch, depth + 1) for branch in branches]
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list):
                factors.append([one for branch in branches for one in self.of(branch, depth + 1)])
        for alternatives in conditions(schema):
            factors.append([one for branch in alternatives for one in self.of(branch, depth + 1)])
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
    own: Schema = {
        "properties": _object(schema, "properties"),
        "required": required if isinstance(required, list) else [],
    }
    if patterns := _object(schema, "patternProperties"):
        own["patternProperties"] = patterns
    for name in OTHERS:
        if name in schema:
            own.setdefault("additionalProperties", schema[name])
    if isinstance(least := schema.get("minProperties"), int):
        own["minProperties"] = least
    return own


def conditions(schema: Schema) -> Iterator[list[Any]]:
    """What `then` and `else` and a property's presence add: of each list one schema applies, or {}."""
    if "if" in schema:
        condition = schema["if"]
        yield [{"allOf": [condition, schema.get("then", {})]}, schema.get("else", {})]
    for name in ("dependentSchemas", "dependencies"):
        for key, added in _object(schema, name).items():
            if isinstance(added, dict):
                yield [{}, {"required": [key], "allOf": [added]}]


def _object(schema: Schema, name: str) -> Schema:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
