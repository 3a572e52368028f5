"""From engine events to text: one `Answer` for each request, whatever the route makes of it.

Feeds the parser, finds stop strings, keeps counts and times. Closing it early cancels the request at the
engine.
"""

import asyncio
import math
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from server.api.answer.prefill_pace import PrefillPace
from server.api.answer.stops import StopScanner
from server.api.error_bodies import GenerationFailed
from server.glm.answer_parser import AnswerParser, AnswerPiece
from server.glm.tools import CallPart
from server.link.engine_protocol import Engine
from server.link.messages import (
    Failed,
    Finished,
    FinishReason,
    Generate,
    PrefillPhase,
    Progress,
    PromptScored,
    Queued,
    Token,
    TokenScore,
    Usage,
)

# Pieces of text that are kept one by one before they become one.
HEARD_PIECES = 128


class WaitingRequests:
    """The requests that wait, each with its place where the engine has said one."""

    def __init__(self) -> None:
        self._waiting: dict[str, int | None] = {}

    def enter(self, request_id: str) -> None:
        """Wait at the end."""
        self._waiting[request_id] = None

    def place(self, request_id: str, num_before: int) -> None:
        """Wait there: the engine's order is not that of arrival."""
        self._waiting[request_id] = num_before

    def leave(self, request_id: str) -> None:
        """Wait no more, if it did."""
        self._waiting.pop(request_id, None)

    def num_before(self, request_id: str) -> int | None:
        """How many others are served first; None for a request that does not wait.

        An engine in the middle of a step has not seen the latest yet: those stand behind all earlier ones.
        """
        if request_id not in self._waiting:
            return None
        place = self._waiting[request_id]
        return list(self._waiting).index(request_id) if place is None else place


Phase = Literal["queued", "waiting"] | PrefillPhase | Literal["writing"]


@dataclass(frozen=True)
class Delta:
    """New text and parts of calls, and the scores of the content tokens that brought it."""

    reasoning: str = ""
    content: str = ""
    scores: tuple[TokenScore, ...] = ()
    calls: tuple[CallPart, ...] = ()


class Heard:
    """What a client was sent so far, without scores; many small pieces become a large one now and then."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def add(self, delta: Delta) -> None:
        """Keeps the text and the calls of a piece; a token's object would take a hundred times its text."""
        self.deltas.append(replace(delta, scores=()) if delta.scores else delta)
        if len(self.deltas) == HEARD_PIECES:
            self.deltas = [merged(self.deltas)]


def merged(deltas: list[Delta]) -> Delta:
    """One piece with the text and calls of several, without scores."""
    calls: dict[int, list[CallPart]] = {}
    for part in (part for delta in deltas for part in delta.calls):
        calls.setdefault(part.index, []).append(part)
    reasoning = "".join(delta.reasoning for delta in deltas)
    content = "".join(delta.content for delta in deltas)
    return Delta(reasoning, content, (), tuple(map(_merged_call, calls.values())))


def _merged_call(parts: list[CallPart]) -> CallPart:
    call_id, name = max(part.id for part in parts), max(part.name for part in parts)  # one part has them
    arguments = "".join(part.arguments for part in parts)
    return CallPart(parts[0].index, call_id, name, arguments, any(part.is_complete for part in parts))


class Answer:
    """Iterate over `deltas()` to its end; then `reason` and the counts are final."""

    def __init__(
        self,
        engine: Engine,
        parser: AnswerParser,
        request: Generate,
        stops: list[str],
        max_calls: int | None = None,
        line: WaitingRequests | None = None,
    ) -> None:
        self.request = request
        self.parser = parser
        self.prompt_scores: list[TokenScore] = []
        self.first_at: float | None = None
        self.begun_s = 0.0  # by the monotonic clock: the engine took it, its first and its last token came
        self.first_s = 0.0
        self.last_s = 0.0
        self.token_gaps = array("f")  # seconds between tokens
        self.token_ids = array("i")
        self.has_begun = False  # the engine has worked on it
        self.failure = ""  # why the engine gave up on it
        self.remark = ""  # for its line in the log
        self._progress: Progress | None = None
        self._pace = PrefillPace()
        self._reason: FinishReason | None = None
        self._engine = engine
        self._max_calls = max_calls
        self._line = line or WaitingRequests()
        self._scanner = StopScanner(stops)
        self._thought: list[str] = []
        self._is_cancelled = False  # by an operator
        self._has_said = False  # something beside the thought
        self._num_tokens = 0
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far, or in the end."""
        num_cached = self._progress.num_cached if self._progress else 0
        return self._usage or Usage(len(self.request.token_ids), self._num_tokens, num_cached)

    @property
    def is_whole_turn(self) -> bool:
        """Whether the client saw all that was generated, up to where the model or the last call ended it."""
        is_cut = self._scanner.is_stopped or self.parser.num_rejected_calls or self.parser.part == "call"
        return self._reason == "stop" and not is_cut

    @property
    def reason(self) -> str | None:
        """Why the answer is over. An incomplete call is no reason to run the others: it counts as a limit."""
        if self._reason and self.parser.num_incomplete_calls:
            return "length"
        is_cut = self._reason == "length" and self.parser.num_rejected_calls
        return "tool_calls" if self._reason and self.parser.num_calls and not is_cut else self._reason

    def cancel(self) -> None:
        """Ends the answer with an error for its client, and the work at the engine; for the event loop."""
        self._is_cancelled = True
        self._engine.cancel(self.request.request_id)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. Raises GenerationFailed where the engine gives up."""
        self._line.enter(self.request.request_id)
        try:
            async with aclosing(self._engine.generate(self.request)) as events:
                async for event in events:
                    if self._is_cancelled:
                        raise GenerationFailed("cancelled", "the request was cancelled by an operator")
                    if isinstance(event, Queued):
                        self._line.place(event.request_id, event.num_before)
                        continue
                    self._line.leave(self.request.request_id)
                    if not isinstance(event, Failed):
                        self.has_begun, self.begun_s = True, self.begun_s or time.monotonic()
                    match event:
                        case Progress():
                            self._on_progress(event)
                        case Token():
                            yield self._on_token(event.score)
                        case PromptScored():
                            self.prompt_scores.extend(event.scores)
                        case Failed():
                            error = GenerationFailed.from_event(event)
                            self.failure = "" if event.kind == "cancelled" else error.error_type
                            raise error
                        case Finished():
                            self._reason, self._usage = event.reason, event.usage
                            yield self._last_delta()
                    if self._has_enough:
                        self._reason = "stop"
                        return
        finally:
            self._line.leave(self.request.request_id)

    @property
    def _has_enough(self) -> bool:
        """Whether a stop string or the last call that is wanted has come."""
        return self._scanner.is_stopped or self.parser.num_calls >= (self._max_calls or math.inf)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._scanner.found

    @property
    def progress(self) -> str:
        """What its client is told: `queue=2`, `restoring=0/900`, `prefill=3/900 eta=7s`, `writing=5`.

        `queue` counts the requests before it, the others count tokens.
        """
        phase, progress = self.phase, self._progress
        if phase == "queued":
            return f"queue={self.num_before}"
        if phase == "writing":
            return f"writing={self._num_tokens}"
        if progress is None or progress.num_prefilled == progress.num_prompt_tokens:
            return ""
        name = "restoring" if phase == "restoring" else "prefill"
        text = f"{name}={progress.num_prefilled}/{progress.num_prompt_tokens}"
        return text if self.eta_s is None else f"{text} eta={self.eta_s}s"

    @property
    def phase(self) -> Phase:
        """What happens to it now; "waiting": the engine has not begun with its prompt."""
        if self.num_before is not None:
            return "queued"
        if self.first_s:
            return "writing"
        return self._progress.phase if self._progress else "waiting"

    @property
    def num_before(self) -> int | None:
        """Requests that the engine takes first; None for one that does not wait."""
        return self._line.num_before(self.request.request_id)

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt that have been read; a running pass counts by the layers that are done."""
        return self._progress.num_prefilled if self._progress else 0

    @property
    def eta_s(self) -> int | None:
        """Seconds until the prompt has been read, at the rate so far; None where that is unknown."""
        if self.phase != "reading" or self._progress is None:
            return None
        return self._pace.eta_s(self._progress.num_prompt_tokens)

    def _on_progress(self, event: Progress) -> None:
        self._progress = event
        if event.phase == "reading":
            self._pace.note(event.num_prefilled)

    def _on_token(self, score: TokenScore) -> Delta:
        now_s = time.monotonic()
        self._num_tokens += 1
        self.token_ids.append(score.token_id)
        if self.first_s:
            self.token_gaps.append(now_s - self.last_s)
        self.first_s, self.last_s = self.first_s or now_s, now_s
        self.first_at = self.first_at or time.time()
        was_content = self.parser.part == "content"
        piece = self.parser.push(score.token_id)
        is_visible = was_content and self.parser.part == "content"
        return self._delta(piece, (score,) if is_visible else ())

    def _delta(self, piece: AnswerPiece, scores: tuple[TokenScore, ...] = ()) -> Delta:
        content = self._scanner.push(piece.content)
        if self.parser.part == "call":  # no stop string reaches over it, and it comes behind the text
            content += self._scanner.flush()
        wanted = self._max_calls or math.inf  # calls of a thought may come several at once
        calls = tuple(part for part in piece.calls if part.index < wanted)
        self._thought.append(piece.reasoning)
        self._has_said = self._has_said or bool(piece.content.strip() or calls)
        return Delta(piece.reasoning, content, scores, calls)

    def _last_delta(self) -> Delta:
        delta = self._delta(self.parser.flush(self._reason == "stop"))
        content = delta.content + self._scanner.flush()
        if self._reason == "stop" and self.parser.part == "reasoning" and not self._has_said:
            content = "".join(self._thought)  # the model ended its turn in its thought: that is its answer
        return replace(delta, content=content)


T = TypeVar("T")


class _End:
    """The last entry of a stream, with the error that ended it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's index; the first error ends all."""
    if len(streams) == 1:  # a queue and a task would cost more than all the rest of a token
        async with aclosing(streams[0]) as only:
            async for only_item in only:
                yield 0, only_item
        return
    queue: asyncio.Queue[tuple[int, T | _End]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        end = _End(None)
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
        except Exception as error:  # raised where the items are read
            end = _End(error)
        queue.put_nowait((index, end))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item = await queue.get()
            if not isinstance(item, _End):
                yield index, item
            elif item.error:
                raise item.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
