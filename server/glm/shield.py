"""Keeps text of clients apart from the markup of a prompt, whatever a chat template does with it.

In text of clients each punctuation mark that markup is spelled with (GLM: < > | [ ] /) becomes a stand-in: a
lone surrogate, which no client can send. Templates hand stand-ins on like any other character. The rendered
text is cut at markup, which only the template can have written, and stand-ins become marks again. Pure.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers

FIRST_STAND_IN = 0xDC00
SURROGATE = re.compile("[\ud800-\udfff]")
# Characters that are looked at in one go: between two pieces other threads may have the interpreter.
PIECE = 2**16


class Shield:
    """The markup of one vocabulary: its added tokens, the think and tool tags among them."""

    def __init__(self, added: Mapping[int, tokenizers.AddedToken]) -> None:
        self._ids = {token.content: token_id for token_id, token in added.items()}
        words = {token.content for token in added.values() if token.special and not _marks(token.content)}
        marks = {char for text in self._ids for char in _marks(text)}
        chars = sorted(marks | {word[0] for word in words})
        stand_ins = {char: chr(FIRST_STAND_IN + index) for index, char in enumerate(chars)}
        self._hidden = {word: stand_ins[word[0]] + word[1:] for word in words}
        self._hidden |= {char: stand_ins[char] for char in marks}
        self._shown = {stand_in: char for char, stand_in in stand_ins.items()}
        longest_first = sorted(added.values(), key=lambda token: -len(token.content))
        self._pattern = re.compile("|".join(map(_pattern, longest_first)) or "(?!)")
        self._hides_chars = all(len(shown) == 1 for shown in self._hidden)
        # Characters of the longest match and one more; none where a match may have any number of blanks.
        has_blanks = any(token.lstrip or token.rstrip for token in added.values())
        self._reach = None if has_blanks else max(map(len, self._ids), default=0) + 1

    def hide(self, value: Any) -> Any:
        """The same value, strings and keys of objects in it with stand-ins."""
        match value:
            case str():
                return self._hide_text(value)
            case dict():
                return {self.hide(key): self.hide(one) for key, one in value.items()}
            case list():
                return [self.hide(one) for one in value]
            case _:
                return value

    def show(self, text: str) -> str:
        """A text with its marks back."""
        return text if text.isascii() else _by_pieces(self._show_piece, text)

    def _show_piece(self, text: str) -> str:
        for stand_in, char in self._shown.items():
            text = text.replace(stand_in, char)
        return text

    def cut(self, rendered: str) -> list[int | str]:
        """The ids of markup, and between them ordinary text."""
        pieces: list[int | str] = []
        start = 0
        for found in self._markup(rendered):
            if start < found.start():
                pieces.append(self.show(rendered[start : found.start()]))
            text = found.group()
            pieces.append(self._ids[text if text in self._ids else text.strip()])
            start = found.end()
        return [*pieces, self.show(rendered[start:])] if start < len(rendered) else pieces

    def _markup(self, rendered: str) -> Iterator[re.Match[str]]:
        """Where markup stands, in order. Each piece is searched a little beyond its end."""
        start = 0
        while start < len(rendered):
            stop, reach = (start + PIECE, self._reach) if self._reach else (len(rendered), 0)
            end = stop
            for found in self._pattern.finditer(rendered, start, stop + reach):
                if found.start() >= stop:
                    break
                yield found
                end = max(stop, found.end())
            start = end

    def _hide_text(self, text: str) -> str:
        return _by_pieces(self._hide_piece, text) if self._hides_chars else self._hide_piece(text)

    def _hide_piece(self, text: str) -> str:
        if not text.isascii():
            text = SURROGATE.sub("\ufffd", text)
        for shown, hidden in self._hidden.items():
            text = text.replace(shown, hidden)
        return text


def _by_pieces(change: Callable[[str], str], text: str) -> str:
    """The text with each piece of it changed."""
    if len(text) <= PIECE:
        return change(text)
    return "".join(change(text[start : start + PIECE]) for start in range(0, len(text), PIECE))


def _marks(text: str) -> set[str]:
    """The characters of markup that stand in no word: templates may look for words of their own."""
    return {char for char in text if not (char.isalnum() or char.isspace() or char == "_")}


def _pattern(token: tokenizers.AddedToken) -> str:
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")
