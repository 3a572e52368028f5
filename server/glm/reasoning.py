"""Parts an answer into thought and content, token by token. One `ReasoningSplitter` for each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.glm.tokenizer import Detokenizer, Tokenizer

Part = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Piece:
    """Text of one part, perhaps empty: a token may complete no character."""

    part: Part
    text: str


class ReasoningSplitter:
    """Follows the think tags, by token id, from the state in which the prompt leaves the model.

    GLM's prompt ends in `<think>`, so an answer starts inside a thought. The tags themselves belong to
    neither part; a closing tag that closes nothing is dropped. Inactive, all is content, tags included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], is_active: bool = True) -> None:
        self._text = Detokenizer(tokenizer)
        self._think_id = tokenizer.think_id if is_active else None
        self._end_think_id = tokenizer.end_think_id if is_active else None
        is_thinking = self._think_id is not None and prompt[-1] == self._think_id
        self._part: Part = "reasoning" if is_thinking else "content"
        self.num_reasoning_tokens = 0

    @property
    def part(self) -> Part:
        """Where the answer is now."""
        return self._part

    def push(self, token_id: int) -> Piece:
        """What this token adds."""
        if token_id == self._think_id:
            return self._enter("reasoning")
        if token_id == self._end_think_id:
            return self._enter("content")
        if self._part == "reasoning":
            self.num_reasoning_tokens += 1
        return Piece(self._part, self._text.push(token_id))

    def flush(self) -> Piece:
        """What is left at the end."""
        return Piece(self._part, self._text.flush())

    def _enter(self, part: Part) -> Piece:
        rest = self.flush()
        self._part = part
        return rest
