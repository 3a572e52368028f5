"""Reads answers with the parser, and writes tool calls as the model does."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.glm.answer_parser import AnswerParser, AnswerPiece
from server.glm.tokenizer import Tokenizer
from server.glm.tools import CallPart, ToolSet


@dataclass
class Parsed:
    """A whole answer. `calls` are the complete ones; `fragments` is all that a stream sent for each index.

    `names` are those of all calls.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    fragments: dict[int, str] = field(default_factory=dict)
    num_rejected: int = 0
    names: list[str] = field(default_factory=list, compare=False)


def make_tools(**properties: Any) -> ToolSet:
    """One tool, `f`, with these properties."""
    return ToolSet([{"name": "f", "parameters": {"type": "object", "properties": properties}}])


def parse_ids(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    tools: ToolSet | None,
    prompt: str = "<think></think>",
    is_turn_over: bool = True,
) -> Parsed:
    parser = AnswerParser(tokenizer, tokenizer.encode(prompt), tools)
    pieces = [*map(parser.push, token_ids), parser.flush(is_turn_over)]
    parsed = collect(pieces)
    assert len(parsed.calls) == parser.num_calls
    parsed.num_rejected = parser.num_rejected_calls
    return parsed


def parse(tokenizer: Tokenizer, answer: str, tools: ToolSet | None, **options: Any) -> Parsed:
    return parse_ids(tokenizer, tokenizer.encode(answer), tools, **options)


def collect(pieces: Sequence[AnswerPiece]) -> Parsed:
    """What a client makes of the pieces."""
    parsed = Parsed("".join(p.reasoning for p in pieces), "".join(p.content for p in pieces))
    parts = [part for piece in pieces for part in piece.calls]
    for part in parts:
        assert bool(part.id) == bool(part.name), "the name comes whole, with the id"
        assert not (part.id and part.index in parsed.fragments), "the name comes once"
        parsed.fragments[part.index] = parsed.fragments.get(part.index, "") + part.arguments
    names = {part.index: part.name for part in parts if part.name}
    parsed.names = list(names.values())
    for part in parts:
        if part.is_complete:
            parsed.calls.append((names[part.index], json.loads(parsed.fragments[part.index])))
    return parsed


def call_ids(parts: Iterable[CallPart]) -> list[str]:
    return [part.id for part in parts if part.id]


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text in ordinary tokens, byte by byte: tags in it are no tags."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(300) if len(tokenizer.token_bytes(i)) == 1}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def call_tokens(tokenizer: Tokenizer, name: str, arguments: dict[str, Any]) -> list[int]:
    """A call as the template would write it, with the tags as tags and all else spelled."""

    def tag(text: str) -> list[int]:
        return tokenizer.encode(text)

    ids = tag("<tool_call>") + spelled(tokenizer, name)
    for key, value in arguments.items():
        raw = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        ids += tag("<arg_key>") + spelled(tokenizer, key) + tag("</arg_key>")
        ids += tag("<arg_value>") + spelled(tokenizer, raw) + tag("</arg_value>")
    return ids + tag("</tool_call>")
