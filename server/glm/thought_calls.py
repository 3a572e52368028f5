"""Calls that begin inside a thought, held until it shows whether the model calls or writes about calling.

A model may forget to close its thought before it calls; then the turn ends with the call. A thought that only
names the tags, or quotes a whole call, goes on, or is closed and followed by an answer.
"""

from server.glm.lexer import Lexeme, Tag
from server.glm.tools import CallParser, CallPart, MalformedCall, ToolSet


class ThoughtCalls:
    """One call or several in a row, with all that was read since the first began."""

    def __init__(self, first_index: int, tools: ToolSet, begin: Tag) -> None:
        self.lexemes: list[Lexeme] = [begin]
        self.parts: list[CallPart] = []
        self.num_calls = 0
        self.num_tokens = 0
        self._first_index = first_index
        self._tools = tools
        self._is_thought_over = False
        self._call: CallParser | None = CallParser(first_index, tools)

    def push(self, lexeme: Lexeme) -> bool:
        """Take what comes next. False: it shows that the thought went on, and `lexemes` belong to it."""
        self.lexemes.append(lexeme)
        if self._call and self._call.may_end and lexeme == Tag("<tool_call>"):
            self._close(self._call.end_turn())
        if self._call:
            return lexeme != Tag("</think>") and self._advance(self._call, lexeme)
        if lexeme == Tag("<tool_call>") and not self._is_thought_over:
            self._call = CallParser(self._first_index + self.num_calls, self._tools)
            return True
        if lexeme == Tag("</think>") and not self._is_thought_over:
            self._is_thought_over = True
            return True
        return isinstance(lexeme, str) and not lexeme.strip()

    def end_turn(self) -> bool:
        """Whether all calls are complete at the end of the turn."""
        if self._call and self._call.may_end:
            self._close(self._call.end_turn())
        return self._call is None

    def _advance(self, call: CallParser, lexeme: Lexeme) -> bool:
        try:
            parts = call.push(lexeme)
        except MalformedCall:
            return False
        if call.is_closed:
            self._close(parts)
        else:
            self.parts += parts
        return True

    def _close(self, parts: list[CallPart]) -> None:
        self.parts += parts
        self.num_calls += 1
        self._call = None
