"""Renders a conversation with the turns that the server itself has generated put back token by token.

Clients drop thoughts, reorder the keys of arguments and strip blanks; each of these makes the next prompt
another text than the one that was computed, and all behind it is read anew. A turn that says the same as one
that is remembered is replaced by its very tokens, where the template would have kept its thought. Called by
the chat route, in the thread that renders.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config.errors import RequestError
from server.api.prompt.remembered import Remembered, Said
from server.api.request.chat_schema import ChatRequest
from server.glm.lexer import THINK_TAGS
from server.glm.pieces import Check, unchecked
from server.glm.templates.template import ChatTemplate
from server.glm.tokenizer import Tokenizer

THINK, END_THINK = THINK_TAGS
# Claude Code puts such a line, with a checksum of the request, at the top of the system prompt. Left in, it
# would make every prompt a new one from its first line on.
BILLING_HEADER = "x-anthropic-billing-header:"
_BILLING = re.compile(rf"\s*{BILLING_HEADER}(?:[ \t]*[\w.-]+=[^;\s]*(?:;|(?=\s|$)))*[ \t]*\n?")


def without_volatile_lines(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, without a billing header at the top of system messages."""
    return [
        {**message, "content": _BILLING.sub("", message["content"], count=1)}
        if message["role"] == "system" and _BILLING.match(message["content"])
        else message
        for message in messages
    ]


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

    def render(self, body: ChatRequest, check: Check) -> Rendered:
        """The prompt as tokens. Raises RequestError where the template refuses, and what `check` raises."""
        messages = without_volatile_lines(body.template_messages())
        said = dict(self._recall(messages))
        token_ids, num_replayed = self._splice(body, messages, said, check) if said else (None, 0)
        if token_ids is None:
            token_ids = self._tokenizer.encode_rendered(self._text(body, messages), check)
        return Rendered(token_ids, num_replayed, str(messages[-1].get("content") or ""))

    def _text(self, body: ChatRequest, messages: Sequence[Message], marks: "Marks | None" = None) -> str:
        return render_messages(self._tokenizer, self._template, body, messages, marks)

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
        self, body: ChatRequest, messages: Sequence[Message], said: dict[int, Said], check: Check
    ) -> tuple[list[int] | None, int]:
        """Render with marks for the turns, and put their tokens where the marks are.

        A turn whose mark does not come out as expected is rendered as text, with its thought: the template
        leaves thoughts out there, or writes turns in another form than ours.
        """
        if self._tokenizer.think_id is None or self._tokenizer.end_think_id is None:
            return None, 0
        messages = _with_thoughts(messages, said)
        marks = {index: _Mark(index, turn.is_thinking) for index, turn in said.items()}
        text = self._text(body, messages, marks)
        if lost := [index for index, mark in marks.items() if not mark.is_in(text)]:
            for index in lost:
                del marks[index]
            text = self._text(body, messages, marks)
        token_ids: list[int] = []
        for index, mark in marks.items():
            before, text = mark.split(text)
            token_ids += self._tokenizer.encode_rendered(before, check)
            token_ids += said[index].token_ids
            check(len(token_ids))
        token_ids += self._tokenizer.encode_rendered(text, check)
        check(len(token_ids))
        return token_ids, len(marks)


@dataclass(frozen=True)
class _Mark:
    """What stands for a turn while the conversation is rendered: surrogates, which no client can send."""

    index: int
    is_thinking: bool

    @property
    def message(self) -> Message:
        turn = {"role": "assistant", "content": self._content}
        return turn | ({"reasoning_content": self._thought} if self.is_thinking else {})

    @property
    def _content(self) -> str:
        return f"\ud800{self.index}\ud801"

    @property
    def _thought(self) -> str:
        return f"\ud802{self.index}\ud803"

    @property
    def _generated(self) -> str:
        """The marks as they stand where the model began to write: behind the prompt's last tag."""
        return (f"{self._thought}{END_THINK}" if self.is_thinking else "") + self._content

    @property
    def _tag(self) -> str:
        return THINK if self.is_thinking else END_THINK

    def is_in(self, text: str) -> bool:
        """Whether the turn stands between the tags between which it was generated."""
        _, found, behind = text.partition(self._tag + self._generated)
        return bool(found) and behind.startswith("<|")

    def split(self, text: str) -> tuple[str, str]:
        """The text before the turn, and behind it."""
        before, _, behind = text.partition(self._generated)
        return before, behind


Marks = Mapping[int, _Mark]


def render_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    body: ChatRequest,
    messages: Sequence[Message],
    marks: Marks | None = None,
) -> str:
    """The rendered conversation, text of clients hidden by the shield; marks stand in place of some turns."""
    shield, marks = tokenizer.shield, marks or {}
    hidden = [
        marks[index].message if index in marks else shield.hide(message)
        for index, message in enumerate(messages)
    ]
    options = template.options(body.effort, body.is_thinking_enabled)
    options["clear_thinking"] = body.clears_thinking
    try:
        return template.render(hidden, shield.hide(body.template_tools()), options)
    except RequestError as error:  # what a template says may repeat a client's words
        raise RequestError(shield.show(str(error)), param=error.param) from error


def prompt_of(
    tokenizer: Tokenizer, template: ChatTemplate, body: ChatRequest, check: Check = unchecked
) -> list[int]:
    """The prompt of a conversation as its client tells it. Raises RequestError where the template refuses."""
    messages = without_volatile_lines(body.template_messages())
    return tokenizer.encode_rendered(render_messages(tokenizer, template, body, messages), check)


def _with_thoughts(messages: Sequence[Message], said: Mapping[int, Said]) -> list[Message]:
    """The messages, each remembered turn with its thought."""
    return [
        {**message, "reasoning_content": said[index].reasoning}
        if index in said and said[index].reasoning
        else message
        for index, message in enumerate(messages)
    ]


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
