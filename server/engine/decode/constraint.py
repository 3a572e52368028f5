"""What the next token of one sequence may be: ends thoughts that are long enough, holds to a grammar.

One `Constraint` for each sequence; called by the engine's thread, before each draw and after it.
"""

from concurrent.futures import Future

import mlx.core as mx

from server.engine.decode.token_masks import Matcher
from server.link.messages import Generate

NEVER = -float("inf")


class Constraint:
    """Thought first, then the grammar, if the request has either."""

    def __init__(self, request: Generate, coming: Future[Matcher] | None) -> None:
        self._thought = request.thought
        self._stop_token_ids = request.stop_token_ids
        self._coming = coming
        self._matcher: Matcher | None = None
        self._num_thought_tokens = 0

    @property
    def is_ready(self) -> bool:
        """Whether the grammar, if there is one, has been read."""
        return self._coming is None or self._coming.done()

    @property
    def is_slow(self) -> bool:
        """Whether a draw would have to wait for what the grammar allows."""
        return self._thought is None and self._matcher is not None and self._matcher.is_slow

    def begin(self) -> None:
        """Take the grammar, which has been read, before the first draw. Raises what is wrong with it."""
        if self._coming:
            self._matcher, self._coming = self._coming.result(), None
            if self._thought is None:
                self._matcher.start()

    def give_up(self) -> None:
        """Nobody wants the grammar any more."""
        if self._coming:
            self._coming.cancel()

    def apply(self, logits: mx.array) -> mx.array:  # [V]
        """The logits, minus infinity where a token is not allowed."""
        if self._thought is None:
            return self._matcher.apply(logits) if self._matcher else logits
        if self._num_thought_tokens == self._thought.max_tokens:
            return mx.where(mx.arange(logits.size) == self._thought.end_token_id, logits, NEVER)
        return _closing_first(logits, self._thought.end_token_id, self._stop_token_ids)

    def accept(self, token_id: int) -> None:
        """Take note of the token that was drawn."""
        if self._thought is None:
            if self._matcher:
                self._matcher.accept(token_id)
        elif token_id == self._thought.end_token_id:
            self._thought = None
            if self._matcher:
                self._matcher.start()
        else:
            self._num_thought_tokens += 1


def _closing_first(logits: mx.array, end_token_id: int, stop_token_ids: frozenset[int]) -> mx.array:  # [V]
    """Inside a thought the wish to end the turn closes the thought: else there would be no answer."""
    if not stop_token_ids:
        return logits
    stops = sorted(stop_token_ids)
    closing = mx.logsumexp(logits[mx.array([end_token_id, *stops])])
    return logits.at[mx.array(stops)].add(NEVER).at[mx.array([end_token_id])].maximum(closing)
