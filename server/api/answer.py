"""From engine events to text: one `Answer` for each request, whatever the route makes of it.

Detokenises, parts thought from content, finds stop strings, keeps the count, and writes the request's line
in the log. Closing it early cancels the request at the engine.
"""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from server.api.errors import GenerationFailed
from server.api.stops import StopScanner
from server.engine.interface import Engine
from server.engine.messages import (
    Failed,
    Finished,
    FinishReason,
    Generate,
    PromptScored,
    Token,
    TokenScore,
    Usage,
)
from server.glm.reasoning import Piece, ReasoningSplitter
from server.glm.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """New text, and the scores of the content tokens that brought it."""

    reasoning: str = ""
    content: str = ""
    scores: tuple[TokenScore, ...] = ()


class Answer:
    """Iterate over `deltas()` to its end; then `reason` and the counts are final."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        request: Generate,
        stops: list[str],
        splits_reasoning: bool = True,
    ) -> None:
        self.request = request
        self.reason: FinishReason | None = None
        self.prompt_scores: list[TokenScore] = []
        self._engine = engine
        self._splitter = ReasoningSplitter(tokenizer, request.token_ids, splits_reasoning)
        self._scanner = StopScanner(stops)
        self._num_tokens = 0
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far, or in the end."""
        return self._usage or Usage(len(self.request.token_ids), self._num_tokens)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thought."""
        return self._splitter.num_reasoning_tokens

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. Raises GenerationFailed where the engine gives up."""
        started_at = time.monotonic()
        try:
            async with aclosing(self._engine.generate(self.request)) as events:
                async for event in events:
                    match event:
                        case Token():
                            yield self._on_token(event.score)
                        case PromptScored():
                            self.prompt_scores.extend(event.scores)
                        case Failed():
                            raise GenerationFailed.from_event(event)
                        case Finished():
                            self.reason, self._usage = event.reason, event.usage
                            yield self._last_delta()
                    if self._scanner.is_stopped:
                        self.reason = "stop"
                        return
        finally:
            self._log(time.monotonic() - started_at)

    def _on_token(self, score: TokenScore) -> Delta:
        self._num_tokens += 1
        was_content = self._splitter.part == "content"
        piece = self._splitter.push(score.token_id)
        is_visible = was_content and self._splitter.part == "content"
        return self._delta(piece, (score,) if is_visible else ())

    def _delta(self, piece: Piece, scores: tuple[TokenScore, ...] = ()) -> Delta:
        if piece.part == "reasoning":
            return Delta(reasoning=piece.text, scores=scores)
        return Delta(content=self._scanner.push(piece.text), scores=scores)

    def _last_delta(self) -> Delta:
        delta = self._delta(self._splitter.flush())
        return Delta(delta.reasoning, delta.content + self._scanner.flush())

    def _log(self, seconds: float) -> None:
        usage = self.usage
        log.info(
            "%s %s: %d prompt + %d new tokens in %.2f s, %.1f tok/s",
            self.request.request_id,
            self.reason or "ended early",
            usage.num_prompt_tokens,
            usage.num_completion_tokens,
            seconds,
            usage.num_completion_tokens / max(seconds, 1e-9),
        )
