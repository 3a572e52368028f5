"""Parts an answer into thought, content and tool calls, token by token. One `AnswerParser` for each answer.

GLM's prompt ends in `<think>`, so an answer starts inside a thought; the state in which the prompt leaves
the model decides. The tags belong to no part; a `</think>` that closes nothing is dropped. A call that
breaks off or is malformed stays an incomplete call; what has no name was never one, and is content.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from server.glm.lexer import CALL_TAGS, THINK_TAGS, Lexeme, Lexer, Tag
from server.glm.thought_calls import ThoughtCalls
from server.glm.tokenizer import Tokenizer
from server.glm.tools import CallParser, CallPart, MalformedCall, ToolSet

Part = Literal["reasoning", "content", "call"]

BEGIN_CALL, END_CALL, END_THINK = Tag("<tool_call>"), Tag("</tool_call>"), Tag("</think>")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerPiece:
    """What some tokens add to each part."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPart, ...] = ()


class AnswerParser:
    """Follows the tags. Without `tools` those of calls are text; inactive, all is content, tags included."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        tools: ToolSet | None = None,
        is_active: bool = True,
    ) -> None:
        tags = (*THINK_TAGS, *(CALL_TAGS if tools else ())) if is_active else ()
        self._lexer = Lexer(tokenizer, tags)
        self._tools = tools or ToolSet(())
        is_thinking = is_active and prompt_is_thinking(tokenizer, prompt)
        self._part: Part = "reasoning" if is_thinking else "content"
        self._call: CallParser | None = None
        self._in_thought: ThoughtCalls | None = None
        self._is_skipping = False  # what is left of a malformed call
        # Blanks around calls are layout, not content. They are held until what follows decides.
        self._holds_blanks = tools is not None
        self._blanks = ""
        self._num_opened = 0
        self.num_calls = 0
        self.num_rejected_calls = 0
        self.num_incomplete_calls = 0  # of the rejected ones those that clients know of
        self.num_reasoning_tokens = 0

    @property
    def part(self) -> Part:
        """Where the answer is now."""
        return self._part

    def push(self, token_id: int) -> AnswerPiece:
        """What this token adds."""
        was_thinking = self._part == "reasoning"
        piece = _join(map(self._on_lexeme, self._lexer.push(token_id)))
        if was_thinking and self._part == "reasoning":
            self.num_reasoning_tokens += 1
            if self._in_thought:
                self._in_thought.num_tokens += 1
        return piece

    def flush(self, is_turn_over: bool) -> AnswerPiece:
        """What is left at the end; `is_turn_over` when the model ended it, rather than a limit."""
        pieces = list(map(self._on_lexeme, self._lexer.flush()))
        if self._in_thought:
            pieces.append(self._end_thought_calls(is_turn_over))
        if self._call and is_turn_over and self._call.may_end:
            pieces.append(self._advance(self._call, None))
        if self._call:
            pieces.append(self._reject(self._call, "it breaks off", is_cut=not is_turn_over))
        blanks, self._blanks = self._blanks, ""
        return _join(pieces if self._num_opened else [*pieces, AnswerPiece(content=blanks)])

    def _on_lexeme(self, lexeme: Lexeme) -> AnswerPiece:
        if self._in_thought:
            return self._on_lexeme_of_thought_call(self._in_thought, lexeme)
        if self._is_skipping and lexeme not in (BEGIN_CALL, END_CALL):
            return AnswerPiece()
        if self._call and lexeme == BEGIN_CALL and not self._call.is_in_value:
            return self._begin_next_call(self._call)
        if self._call:
            return self._advance(self._call, lexeme)
        match lexeme:
            case Tag("<think>"):
                self._part = "reasoning"
                return AnswerPiece()
            case Tag("</think>"):
                self._part = "content"
                return AnswerPiece()
            case Tag("<tool_call>") if self._part == "reasoning":
                self._in_thought = ThoughtCalls(self._num_opened, self._tools, lexeme)
                return AnswerPiece()
            case Tag("<tool_call>"):
                self._begin_call()
                return AnswerPiece()
            case Tag("</tool_call>") if self._is_skipping:
                self._end_call()
                return AnswerPiece()
            case Tag() if self.num_incomplete_calls and self._part == "content":
                return AnswerPiece()  # the rest of a malformed call, which had such tags in a value
            case Tag(text):
                return self._on_text(text)
            case text:
                return self._on_text(text)

    def _on_lexeme_of_thought_call(self, calls: ThoughtCalls, lexeme: Lexeme) -> AnswerPiece:
        if calls.push(lexeme):
            return AnswerPiece()
        self._in_thought = None
        *quoted, last = calls.lexemes
        return _join([*map(self._on_quoted, quoted), self._on_lexeme(last)])

    def _on_quoted(self, lexeme: Lexeme) -> AnswerPiece:
        """A lexeme that was held for a call and belongs to the thought, or comes behind it."""
        if self._part == "reasoning" and lexeme != END_THINK:
            return self._on_text(lexeme.text if isinstance(lexeme, Tag) else lexeme)
        return self._on_lexeme(lexeme)

    def _end_thought_calls(self, is_turn_over: bool) -> AnswerPiece:
        """At the end of the turn calls in a thought were meant, if they are complete."""
        calls, self._in_thought = self._in_thought, None
        assert calls, "asked only where there are some"
        if not (is_turn_over and calls.end_turn()):
            return _join(map(self._on_quoted, calls.lexemes))
        self.num_reasoning_tokens -= calls.num_tokens
        self._num_opened += calls.num_calls
        self.num_calls += calls.num_calls
        self._end_call()
        return AnswerPiece(calls=tuple(calls.parts))

    def _begin_call(self) -> None:
        self._part = "call"
        self._blanks = ""
        self._is_skipping = False
        self._call = CallParser(self._num_opened, self._tools)

    def _begin_next_call(self, call: CallParser) -> AnswerPiece:
        """The model forgot the end of a call, or what was a call so far is none."""
        piece = self._advance(call, None) if call.may_end else self._reject(call, "another one begins")
        self._begin_call()
        return piece

    def _on_text(self, text: str) -> AnswerPiece:
        if self._part == "reasoning":
            return AnswerPiece(reasoning=text)
        if not self._holds_blanks:
            return AnswerPiece(content=text)
        self._blanks += text
        if not self._blanks.strip():
            return AnswerPiece()
        self._holds_blanks = False
        text, self._blanks = self._blanks, ""
        return AnswerPiece(content=text)

    def _advance(self, call: CallParser, lexeme: Lexeme | None) -> AnswerPiece:
        """Feed the call; None is the end of the turn."""
        was_open = call.is_open
        try:
            parts = call.end_turn() if lexeme is None else call.push(lexeme)
        except MalformedCall as error:
            piece = self._reject(call, str(error))
            if lexeme == END_CALL:
                self._end_call()
            return piece
        self._num_opened += call.is_open and not was_open
        if call.is_closed:
            self.num_calls += 1
            self._end_call()
        return AnswerPiece(calls=tuple(parts))

    def _reject(self, call: CallParser, reason: str, is_cut: bool = False) -> AnswerPiece:
        """End a call that is incomplete. What got no name was none: it is content, unless it was cut off."""
        log.warning("a tool call was not passed on whole, %s: %.200r", reason, call.raw)
        self.num_rejected_calls += 1
        was_open = call.is_open
        parts = call.break_off() if was_open or not is_cut else []
        self._end_call()
        if was_open or parts:
            self._num_opened += not was_open
            self.num_incomplete_calls += 1
            self._part, self._is_skipping = "call", True
            return AnswerPiece(calls=tuple(parts))
        self._holds_blanks = False
        return AnswerPiece(content="" if is_cut else call.raw)

    def _end_call(self) -> None:
        self._call = None
        self._part = "content"
        self._holds_blanks = True
        self._is_skipping = False


def prompt_is_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the model answers this prompt from inside a thought."""
    return tokenizer.decode(prompt[-len("<think>") :]).endswith("<think>")


def _join(pieces: Iterable[AnswerPiece]) -> AnswerPiece:
    together = list(pieces)
    if len(together) == 1:
        return together[0]
    return AnswerPiece(
        "".join(piece.reasoning for piece in together),
        "".join(piece.content for piece in together),
        tuple(part for piece in together for part in piece.calls),
    )
