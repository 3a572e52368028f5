"""Bodies that cost much more than they look, and schemas that do."""

import gzip
import json
from collections.abc import Callable
from typing import Any

MIB = 2**20
CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "x"}
Made = tuple[str, bytes, dict[str, str]]


def chat(text: str, **more: Any) -> dict[str, Any]:
    """A chat with one message."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def _large(body: Any, path: str = CHAT) -> Callable[[], Made]:
    return lambda: (path, json.dumps(body(), separators=(",", ":"), ensure_ascii=False).encode(), {})


def _tool(index: int, properties: int = 2) -> dict[str, Any]:
    fields = {f"p{number}": {"type": "string", "description": "what it is"} for number in range(properties)}
    return {
        "type": "function",
        "function": {"name": f"f{index}", "parameters": {"type": "object", "properties": fields}},
    }


def _calls(index: int) -> dict[str, Any]:
    call = {"id": f"c{index}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


BODIES: dict[str, Callable[[], Made]] = {
    "chats of 7.9 MB": _large(lambda: chat("word " * 1_580_000)),
    "64 bodies of the limit at once": _large(lambda: chat("x" * (8 * MIB - 100))),
    "one word of 7.9 MB": _large(lambda: chat("a" * 7_900_000)),
    "7.9 MB made wide by one emoji": _large(lambda: chat("b c " * 1_970_000 + "😀")),
    "7.9 MB of blanks": _large(lambda: chat(" " * 7_900_000)),
    "200,000 small messages": _large(lambda: {"messages": [HELLO] * 200_000}),
    "60,000 small messages": _large(lambda: {"messages": [HELLO] * 60_000}),
    "15,000 calls": _large(lambda: {"messages": [HELLO, *map(_calls, range(15_000))]}),
    "2.6 million empty objects": _large(lambda: chat("x", metadata=[{}] * 2_600_000)),
    "deep JSON": lambda: (CHAT, b"[" * 4_000_000 + b"]" * 4_000_000, {}),
    "a gzip bomb": lambda: (CHAT, gzip.compress(b" " * 100 * MIB), {"content-encoding": "gzip"}),
    "1,000 tools": _large(lambda: chat("x", tools=[_tool(index, 20) for index in range(1000)])),
    "10,000 tools": _large(lambda: chat("x", tools=[_tool(index) for index in range(10_000)])),
    "1,024 prompts, 16 answers each": _large(
        lambda: {"prompt": ["a b c"] * 1024, "n": 16, "max_tokens": 4}, "/v1/completions"
    ),
    "2 million ids to detokenise": _large(lambda: {"tokens": [300, 301] * 1_000_000}, "/v1/detokenize"),
    "7.9 MB to tokenise": _large(lambda: {"prompt": "some words " * 700_000}, "/v1/tokenize"),
}  # fmt: skip


def _named(number: int, schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": schema for index in range(number)}, **more}


def _pattern(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def _chain(keyword: str, turn: int) -> dict[str, Any]:
    steps = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    return {"$defs": {**steps, "d40": _named(1, {"const": turn})}, "$ref": "#/$defs/d0"}


def _nested(turn: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "maxLength": turn + 1}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "minItems": 3, "maxItems": 5}
    return schema


SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "10,000 properties": lambda turn: _named(10_000, {"type": "string"}, title=str(turn)),
    "10,000 required": lambda turn: _named(10_000, {}, required=[f"p{i}" for i in range(10_000)], n=turn),
    "a prime step": lambda turn: {"type": "integer", "multipleOf": 999_983 + turn},
    "a fine step": lambda turn: {"type": "number", "multipleOf": 0.000_123_457 + turn / 10**9},
    "100,000 values": lambda turn: {"enum": [f"value {turn} {i}" for i in range(100_000)]},
    "allOf twice": lambda turn: _chain("allOf", turn),
    "anyOf twice": lambda turn: _chain("anyOf", turn),
    "oneOf twice": lambda turn: _chain("oneOf", turn),
    "nested lists": _nested,
    "repetitions": lambda turn: {"type": "string", "pattern": f"^((a{{1,100}}){{1,100}}){{1,{100 + turn}}}$"},
    "optionals": lambda turn: {"type": "string", "pattern": f"^(a?){{{500 + turn}}}a{{500}}$"},
    "lookbacks": lambda turn: {"type": "string", "pattern": f"(.*a.{{15}}){{{20 + turn % 9}}}"},
    "long strings": lambda turn: {"type": "string", "minLength": 100_000 + turn, "maxLength": 200_000 + turn},
    "long lists": lambda turn: {"type": "array", "items": {"type": "integer"}, "minItems": 50_000 + turn},
    "patterns of names": lambda turn: {"patternProperties": {f"^.*x{i + turn}.*$": {} for i in range(60)}},
    "1,600 patterns": lambda turn: _named(40, _named(40, _pattern(f"^[a-z]{{3,{turn + 40}}}$"))),
    "3,000 anchors": lambda turn: {
        "$defs": {f"a{i}": {"$anchor": f"a{i}", "title": str(turn)} for i in range(3000)},
        **_named(3000, {"$ref": "#a2999"}),
    },
    "8 of 8 branches": lambda turn: {
        "allOf": [{"anyOf": [_named(1, {"const": turn + j}) for j in range(8)]} for _ in range(8)]
    },
    "300 branches": lambda turn: {"anyOf": [_named(50, {"title": f"{i} {turn}"}) for i in range(300)]},
    "a range of digits": lambda turn: {"type": "number", "minimum": 1e-9 + turn, "maximum": 1234567890123.6},
}  # fmt: skip


def _in_content(make: Callable[[int], Any]) -> Callable[[int], Any]:
    return lambda turn: chat(
        "x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": make(turn)}}
    )


def _in_tool(make: Callable[[int], Any]) -> Callable[[int], Any]:
    def body(turn: int) -> Any:
        function = {"name": "f", "parameters": _named(1, make(turn))}
        return chat("x", tools=[{"type": "function", "function": function}], tool_choice="required")

    return body


JSON_BOMBS = {name: _in_content(make) for name, make in SCHEMAS.items()}
TOOL_BOMBS = {name: _in_tool(make) for name, make in SCHEMAS.items()}
