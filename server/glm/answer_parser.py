"""Parts an answer into thought, content and tool calls, token by token. One `AnswerParser` for each answer.

GLM's prompt ends in `<think>`, so an answer starts inside a thought; the state in which the prompt leaves
the model decides. The tags belong to no part; a `</think>` that closes nothing is dropped. A call that
breaks off or is malformed is content, as the model wrote it.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from server.glm.lexer import CALL_TAGS, THINK_TAGS, Lexeme, Lexer, Tag
from server.glm.tokenizer import Tokenizer
from server.glm.tools import CallParser, CallPart, MalformedCall, ToolSet

Part = Literal["reasoning", "content", "call"]

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
        # Blanks around calls are layout, not content. They are held until what follows decides.
        self._holds_blanks = tools is not None
        self._blanks = ""
        self._num_started = 0
        self.num_calls = 0
        self.num_rejected_calls = 0
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
        return piece

    def flush(self, is_turn_over: bool) -> AnswerPiece:
        """What is left at the end; `is_turn_over` when the model ended it, rather than a limit."""
        piece = _join(map(self._on_lexeme, self._lexer.flush()))
        if self._call and is_turn_over:
            piece = _join([piece, self._advance(self._call, None)])
        if self._call:
            piece = _join([piece, self._reject(self._call, "it breaks off")])
        blanks, self._blanks = self._blanks, ""
        return piece if self.num_calls else _join([piece, AnswerPiece(content=blanks)])

    def _on_lexeme(self, lexeme: Lexeme) -> AnswerPiece:
        if self._call and self._call.may_end and lexeme == Tag("<tool_call>"):  # the model forgot its end
            piece = self._advance(self._call, None)
            self._begin_call()
            return piece
        if self._call:
            return self._advance(self._call, lexeme)
        match lexeme:
            case Tag("<think>"):
                self._part = "reasoning"
                return AnswerPiece()
            case Tag("</think>"):
                self._part = "content"
                return AnswerPiece()
            case Tag("<tool_call>"):
                self._begin_call()
                return AnswerPiece()
            case Tag(text):
                return self._on_text(text)
            case text:
                return self._on_text(text)

    def _begin_call(self) -> None:
        self._part = "call"
        self._blanks = ""
        self._call = CallParser(self._num_started, self._tools)
        self._num_started += 1

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
        try:
            parts = call.end_turn() if lexeme is None else call.push(lexeme)
        except MalformedCall as error:
            return self._reject(call, str(error))
        if call.is_closed:
            self.num_calls += 1
            self._end_call()
        return AnswerPiece(calls=tuple(parts))

    def _reject(self, call: CallParser, reason: str) -> AnswerPiece:
        self.num_rejected_calls += 1
        log.warning("a tool call was not passed on, %s: %.200r", reason, call.raw)
        self._end_call()
        self._holds_blanks = False
        return AnswerPiece(content=call.raw)

    def _end_call(self) -> None:
        self._call = None
        self._part = "content"
        self._holds_blanks = True


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
