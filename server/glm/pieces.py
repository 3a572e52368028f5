"""Encodes long texts piece by piece, so that memory and time follow the ids that are wanted, not the text.

A piece ends between two words as the tokenizer takes words, so that its ids are those of the whole text.
"""

from collections.abc import Callable, Sequence

import tokenizers

# Characters of a piece. A word that is longer, without a blank or a mark in it, is cut: no text has one.
PIECE, LONGEST_WORD = 2**15, 2**16
# Words left to the next piece. What a pattern takes for a word depends on the run of characters behind it
# and a little more, never on so many words.
LEFT_WORDS = 16
# Pieces between tags are short: so many are encoded at once.
GROUP = 4096

# Called with the number of ids so far. What it raises ends the work.
Check = Callable[[int], None]


def unchecked(num_ids: int) -> None:
    """Lets work go on."""


class InPieces:
    """One tokenizer, asked for texts of any length. Shared by all threads."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner

    def encode(self, parts: Sequence[int | str], check: Check) -> list[int]:
        """Ids of texts, and ids that stand between them, one after the other."""
        ids: list[int] = []
        waiting: list[int | str] = []
        length = 0
        for part in parts:
            size = len(part) if isinstance(part, str) else 1
            if waiting and (length + size > PIECE or len(waiting) == GROUP):
                ids += self._encode_short(waiting)
                check(len(ids))
                waiting, length = [], 0
            if isinstance(part, str) and size > PIECE:
                self._encode_long(part, ids, check)
            else:
                waiting.append(part)
                length += size
        ids += self._encode_short(waiting)
        check(len(ids))
        return ids

    def _encode_short(self, parts: Sequence[int | str]) -> list[int]:
        """`encode` would hold Python's lock to its end, and with it all who are served."""
        texts = [part for part in parts if isinstance(part, str)]
        encoded = iter(self._inner.encode_batch_fast(texts, add_special_tokens=False))
        return [
            token_id
            for part in parts
            for token_id in (next(encoded).ids if isinstance(part, str) else (part,))
        ]

    def _encode_long(self, text: str, ids: list[int], check: Check) -> None:
        start, size = 0, PIECE
        while start + size < len(text):
            [piece] = self._inner.encode_batch([text[start : start + size]], add_special_tokens=False)
            count = _num_settled(piece.word_ids)
            if not count and size < LONGEST_WORD:
                size *= 2
                continue
            count = count or len(piece.ids)
            ids += piece.ids[:count]
            start += piece.offsets[count][0] if count < len(piece.ids) else size
            size = PIECE
            check(len(ids))
        ids += self._encode_short([text[start:]])
        check(len(ids))


def _num_settled(words: Sequence[int | None]) -> int:
    """How many ids of a piece are those of the whole text, whatever follows; 0 where that is not sure."""
    last = next((word for word in reversed(words) if word is not None), None)
    if last is None or last < LEFT_WORDS:
        return 0
    return next(
        (index for index, word in enumerate(words) if word is not None and word > last - LEFT_WORDS), 0
    )
