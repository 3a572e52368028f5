"""Renders a conversation with the turns that the server itself has generated put back token by token.

Clients drop thoughts, reorder the keys of arguments and strip blanks; each of these makes the next prompt
another text than the one that was computed, and all behind it is read anew. A turn that says the same as one
that is remembered is replaced by its very tokens, where the template would have kept its thought. Called by
the chat route, in the thread that renders.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.prompt.billing_header import without_volatile_lines
from server.api.prompt.remembered import Remembered, Said
from server.api.request.chat_schema import ChatRequest
from server.glm.effort import template_options
from server.glm.template import ChatTemplate
from server.glm.tokenizer import Tokenizer

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A prompt; `num_replayed` turns are the server's own tokens, `answered` is the last message's text."""

    token_ids: list[int]
    num_replayed: int
    answered: str


class Renderer:
    """From the body of a chat to its prompt, for one caller."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, remembered: Remembered, caller: str
    ) -> None:
        self._tokenizer, self._template, self._remembered = tokenizer, template, remembered
        self._caller = caller

    def render(self, body: ChatRequest) -> Rendered:
        """The prompt as tokens. Raises RequestError where the template refuses."""
        messages = without_volatile_lines(body.template_messages())
        said = dict(self._recall(messages))
        text = self._text(body, messages)
        token_ids, num_replayed = self._splice(body, messages, said) if said else (None, 0)
        if token_ids is None:
            token_ids = self._tokenizer.encode(text)
        return Rendered(token_ids, num_replayed, str(messages[-1].get("content") or ""))

    def _text(self, body: ChatRequest, messages: list[Message]) -> str:
        return render_messages(self._template, body, messages)

    def _recall(self, messages: Sequence[Message]) -> Iterator[tuple[int, Said]]:
        """The remembered turns that say the same as those that came back."""
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index:
                calls = message.get("tool_calls") or []
                said = self._remembered.find(
                    self._caller,
                    calls[0]["id"] if calls else None,
                    str(messages[index - 1].get("content") or ""),
                    message["content"],
                )
                if said and _says_the_same(message, said):
                    yield index, said

    def _splice(
        self, body: ChatRequest, messages: Sequence[Message], said: dict[int, Said]
    ) -> tuple[list[int] | None, int]:
        """Render with marks for the turns, and put their tokens where the marks are.

        A turn whose mark does not come out as expected is rendered as text, with its thought: the template
        leaves thoughts out there, or writes turns in another form than ours.
        """
        if self._tokenizer.think_id is None or self._tokenizer.end_think_id is None:
            return None, 0
        marks = {index: _Mark(secrets.token_hex(8), turn.is_thinking) for index, turn in said.items()}
        text = self._text(body, _marked(messages, said, marks))
        if lost := [index for index, mark in marks.items() if not mark.is_in(text)]:
            for index in lost:
                del marks[index]
            text = self._text(body, _marked(messages, said, marks))
        token_ids: list[int] = []
        for index, mark in marks.items():
            before, text = mark.split(text)
            token_ids += [*self._tokenizer.encode(before), *said[index].token_ids]
        return [*token_ids, *self._tokenizer.encode(text)], len(marks)


@dataclass(frozen=True)
class _Mark:
    """What stands for a turn while the conversation is rendered; no client can guess it."""

    nonce: str
    is_thinking: bool

    @property
    def message(self) -> Message:
        turn = {"role": "assistant", "content": f"[content {self.nonce}]"}
        return turn | ({"reasoning_content": f"[thought {self.nonce}]"} if self.is_thinking else {})

    @property
    def _generated(self) -> str:
        """The marks as they stand where the model began to write: behind the prompt's last tag."""
        thought = f"[thought {self.nonce}]</think>" if self.is_thinking else ""
        return f"{thought}[content {self.nonce}]"

    @property
    def _tag(self) -> str:
        return "<think>" if self.is_thinking else "</think>"

    def is_in(self, text: str) -> bool:
        """Whether the turn stands between the tags between which it was generated."""
        _, found, behind = text.partition(self._tag + self._generated)
        return bool(found) and behind.startswith("<|")

    def split(self, text: str) -> tuple[str, str]:
        """The text before the turn, and behind it."""
        before, _, behind = text.partition(self._generated)
        return before, behind


def render_messages(template: ChatTemplate, body: ChatRequest, messages: list[Message]) -> str:
    """The text of a conversation, with the body's tools and options."""
    options = template_options(body.effort, body.is_thinking_enabled)
    options["clear_thinking"] = body.clears_thinking
    return template.render(messages, body.template_tools(), options)


def _marked(messages: Sequence[Message], said: dict[int, Said], marks: dict[int, _Mark]) -> list[Message]:
    """The messages with marks for some turns; the other remembered ones get their thoughts back."""
    result = []
    for index, message in enumerate(messages):
        if index in marks:
            message = marks[index].message
        elif index in said and said[index].reasoning:
            message = {**message, "reasoning_content": said[index].reasoning}
        result.append(message)
    return result


def _says_the_same(message: Message, said: Said) -> bool:
    thought = message.get("reasoning_content")
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]
    return (
        message["content"].strip() == said.content
        and calls == [(call_id, name, json.loads(arguments)) for call_id, name, arguments in said.calls]
        and (thought is None or thought.strip() == said.reasoning.strip())
    )
