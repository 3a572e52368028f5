"""Cuts an answer into tags and text. One `Lexer` for each answer.

A tag is recognised by its token id where the vocabulary has one, so that the same characters spelled with
ordinary tokens, in code about tags for instance, stay text. Where it has none, by its text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.glm.tokenizer import Detokenizer, Tokenizer

THINK_TAGS = ("<think>", "</think>")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


@dataclass(frozen=True)
class Tag:
    """A tag, by what it looks like."""

    text: str


Lexeme = Tag | str


class Lexer:
    """Turns tokens into tags and text, whatever the tokens' borders."""

    def __init__(self, tokenizer: Tokenizer, tags: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        ids = {tag: tokenizer.token_id(tag) for tag in tags}
        self._by_id = {token_id: Tag(tag) for tag, token_id in ids.items() if token_id is not None}
        self._by_text = [tag for tag, token_id in ids.items() if token_id is None]
        self._pattern = re.compile("|".join(map(re.escape, self._by_text)))
        self._held = ""

    def push(self, token_id: int) -> list[Lexeme]:
        """What this token completes."""
        tag = self._by_id.get(token_id)
        if tag is None:
            return self._cut(self._detokenizer.push(token_id))
        return [*self.flush(), tag]

    def flush(self) -> list[Lexeme]:
        """What was held back."""
        lexemes = self._cut(self._detokenizer.flush())
        held, self._held = self._held, ""
        return [*lexemes, held] if held else lexemes

    def _cut(self, text: str) -> list[Lexeme]:
        if not self._by_text:
            return [text] if text else []
        text = self._held + text
        lexemes: list[Lexeme] = []
        start = 0
        for found in self._pattern.finditer(text):
            lexemes += [text[start : found.start()], Tag(found.group())]
            start = found.end()
        end = max(start, self._start_of_held(text))
        self._held = text[end:]
        return [lexeme for lexeme in (*lexemes, text[start:end]) if lexeme]

    def _start_of_held(self, text: str) -> int:
        """Where an ending begins that may become a tag. A tag has its only "<" in front."""
        start = text.rfind("<")
        may_become_tag = start >= 0 and any(tag.startswith(text[start:]) for tag in self._by_text)
        return start if may_become_tag else len(text)
