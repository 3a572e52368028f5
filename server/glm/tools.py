"""Reads one tool call as it is written: `CallParser`, fed by `AnswerParser` with tags and text.

    <tool_call>NAME <arg_key>K</arg_key><arg_value>V</arg_value> ... </tool_call>

Arguments leave as fragments of one JSON object as they come. The object is opened by the first of them and
closed by `</tool_call>` alone, so what was sent of a call that breaks off can never be read as a whole one.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from server.glm.lexer import Lexeme, Tag
from server.glm.schemas.argument_types import ArgumentType, ArgumentTypes


@dataclass(frozen=True)
class CallPart:
    """News of the call at `index`: its id and name come first, then JSON, then that it is complete."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    is_complete: bool = False


class MalformedCall(Exception):
    """What the model wrote is no call. Never leaves server/glm."""


class ToolSet:
    """The functions that the client declared."""

    def __init__(self, functions: Iterable[dict[str, Any]]) -> None:
        self._parameters = {function["name"]: function.get("parameters") for function in functions}
        self._arguments: dict[str, ArgumentTypes] = {}  # of those that were called

    def arguments_of(self, name: str) -> ArgumentTypes:
        """A function's arguments. One that nobody declared is passed on: the client can say so."""
        if name not in self._arguments:
            self._arguments[name] = ArgumentTypes(self._parameters.get(name))
        return self._arguments[name]


# A text longer than this, with blanks in it, is no name, whatever follows.
LONG_NAME = 64

State = Literal["name", "key", "before value", "value", "after value", "closed"]


class CallParser:
    """One call, from behind its `<tool_call>`."""

    def __init__(self, index: int, tools: ToolSet) -> None:
        self.raw = "<tool_call>"
        self._index = index
        self._tools = tools
        self._state: State = "name"
        self._text = ""
        self._arguments = ArgumentTypes(None)
        self._type = ArgumentType()
        self._keys: set[str] = set()
        self._is_streaming = False

    @property
    def is_closed(self) -> bool:
        """Whether the call is complete."""
        return self._state == "closed"

    @property
    def is_open(self) -> bool:
        """Whether its name has been handed out, so that clients know of it."""
        return self._state != "name"

    @property
    def is_in_value(self) -> bool:
        """Whether it is inside a value, where tags are text."""
        return self._state == "value"

    @property
    def may_end(self) -> bool:
        """Whether its arguments are all there, and only its end is missing."""
        return self._state == "after value"

    def push(self, lexeme: Lexeme) -> list[CallPart]:
        """What this adds. Raises MalformedCall where it cannot belong to a call."""
        is_tag = isinstance(lexeme, Tag)
        text = lexeme.text if isinstance(lexeme, Tag) else lexeme
        self.raw += text
        if self._state == "value":
            return self._in_value(text, is_tag)
        return self._on_tag(text) if is_tag else self._on_text(text)

    def end_turn(self) -> list[CallPart]:
        """Close a call whose arguments are all there and whose end the model forgot. Raises MalformedCall."""
        if not self.may_end:
            raise MalformedCall(f"the turn ends in state {self._state!r}")
        return self._close()

    def break_off(self) -> list[CallPart]:
        """What clients need to see an incomplete call. Nothing where it has no name."""
        parts: list[CallPart] = []
        if self._state == "name":
            try:
                parts = self._start()
            except MalformedCall:
                return []
            self._state = "key"
        return parts if self._keys else [*parts, *self._send("{")]

    def _on_text(self, text: str) -> list[CallPart]:
        if self._state in ("name", "key"):
            self._text += text
            is_long = self._state == "name" and len(self._text) > LONG_NAME
            if is_long and len(self._text.split()) > 1:
                raise MalformedCall(f"a sentence for a name: {self._text[:40]!r}")
        elif text.strip():
            raise MalformedCall(f"text between the parts: {text[:40]!r}")
        return []

    def _on_tag(self, tag: str) -> list[CallPart]:
        match self._state, tag:
            case "name", "<arg_key>":
                return [*self._start(), *self._enter("key")]
            case "name", "</tool_call>":
                return [*self._start(), *self._close()]
            case "key", "</arg_key>":
                return self._end_key()
            case "before value", "<arg_value>":
                return self._enter("value")
            case "after value", "<arg_key>":
                return self._enter("key")
            case "after value", "</tool_call>":
                return self._close()
        raise MalformedCall(f"{tag} in state {self._state!r}")

    def _enter(self, state: State) -> list[CallPart]:
        self._state = state
        self._text = ""
        return []

    def _start(self) -> list[CallPart]:
        name = self._text.strip()
        if not name or any(char.isspace() for char in name):
            raise MalformedCall(f"no name of a function: {name[:40]!r}")
        self._arguments = self._tools.arguments_of(name)
        return [CallPart(self._index, id=f"call_{secrets.token_hex(12)}", name=name)]

    def _close(self) -> list[CallPart]:
        self._state = "closed"
        rest = "}" if self._keys else "{}"
        return [CallPart(self._index, arguments=rest, is_complete=True)]

    def _end_key(self) -> list[CallPart]:
        key = self._arguments.known_key(self._text)
        if not key or key in self._keys:
            raise MalformedCall(f"argument {key[:40]!r} is empty or given twice")
        start = "{" if not self._keys else ", "
        self._keys.add(key)
        self._type = self._arguments.of(key)
        self._is_streaming = False
        self._enter("before value")
        return self._send(f"{start}{_quoted(key)}: ")

    def _in_value(self, text: str, is_tag: bool) -> list[CallPart]:
        """Only `</arg_value>` ends a value: other tags in it are text, as in code about tags."""
        if is_tag and text == "<arg_value>":
            raise MalformedCall("a value inside a value")
        if is_tag and text == "</arg_value>":
            rest = '"' if self._is_streaming else self._type.to_json(self._text)
            self._enter("after value")
            return self._send(rest)
        if self._is_streaming:
            return self._send(_quoted(text)[1:-1])
        self._text += text
        if self._type.is_surely_text(self._text):
            self._is_streaming = True
            return self._send(_quoted(self._text)[:-1])
        return []

    def _send(self, arguments: str) -> list[CallPart]:
        return [CallPart(self._index, arguments=arguments)]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
