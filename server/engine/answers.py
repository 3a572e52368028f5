"""From hidden rows to events: scores prompts, draws tokens, finishes sequences. Called by the engine's loop.

Rows of a step are drawn together and read from the device at once; what goes wrong with one sequence
(its grammar, its numbers) ends that sequence alone.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from config.errors import CheckpointChanged, DiskError, EngineError, RequestError
from models.workspace import SCORED_ROWS
from server.engine.decode.sampling import SamplerState, draw, score_tokens
from server.engine.faults import Contained
from server.engine.model_protocol import EngineModel
from server.engine.schedule.passes import Pass
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import Sequence, State
from server.engine.schedule.shared_prefixes import Prefixes
from server.link.messages import (
    Event,
    Failed,
    FailureKind,
    Finished,
    PrefillPhase,
    Progress,
    PromptScored,
    Started,
    Token,
    TokenScore,
)

log = logging.getLogger(__name__)


class Answers:
    """Hands out what complete passes have computed."""

    def __init__(
        self,
        model: EngineModel,
        scheduler: Scheduler,
        prefixes: Prefixes,
        send: Callable[[Event], None],
        max_rows: int,
    ) -> None:
        self._model, self._scheduler, self._prefixes, self._send = model, scheduler, prefixes, send
        self._max_rows = max_rows

    def begin(self, sequence: Sequence) -> bool:
        """Tells the client that its sequence runs. Returns False if its grammar fails, which ends it."""
        with Contained(partial(self.fail, sequence)) as attempt:
            sequence.constraint.begin()
        if not attempt.failed:
            self._send(Started(sequence.request.request_id))
        return not attempt.failed

    def hand_out(self, done: Pass, hidden: mx.array) -> None:  # [N, H]
        """Scores and progress of prompts, and the next token of those whose last row was in the pass."""
        complete: list[tuple[Sequence, int]] = []
        for index, part in enumerate(done.parts):
            sequence, (start, stop) = part.sequence, done.rows_of(index)
            if sequence.has_lost_leader:  # what it adopted may be damaged, too: it is read anew
                done.undo(index)
                continue
            with Contained(partial(self.fail, sequence)) as attempt:
                if sequence.leader:
                    self._prefixes.note_followed(sequence, done.length_before(index))
                    sequence.read_on()
                if done.is_reading or sequence.is_cancelled:  # its rows are kept before it draws a token
                    _check_rows(hidden[start:stop])
                if done.is_reading and not sequence.is_cancelled:
                    self._report(sequence, hidden[start:stop])
            if not attempt.failed and sequence.num_unread == 0 and not sequence.is_cancelled:
                complete.append((sequence, stop - 1))
        self._hand_out(complete, hidden)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends one sequence and tells its client.

        A sequence that came from saved rows to NaN reads its prompt anew instead, and those rows are dropped.
        """
        if isinstance(error, NotANumber) and sequence.num_restored_tokens and not sequence.is_cancelled:
            name, num_tokens = sequence.request.request_id, sequence.num_restored_tokens
            log.error(
                "%s: with %d saved tokens came NaN: they are thrown away, it reads anew", name, num_tokens
            )
            self._prefixes.distrust(sequence)
            self._scheduler.suspend(sequence)
            return
        if kind_of(error) != "request":  # a client's fault, in a client's words, is told to the client only
            log.error("request %s failed", sequence.request.request_id, exc_info=error)
        self._scheduler.retire(sequence)
        message = str(error) or type(error).__name__
        self._send(Failed(sequence.request.request_id, kind_of(error), message))

    def _report(self, sequence: Sequence, hidden: mx.array) -> None:  # [n, H]
        if sequence.request.score_prompt:
            self._score_prompt(sequence, hidden)
        self.tell_progress(sequence)
        self.save(sequence)

    def tell_progress(self, sequence: Sequence, num_read: int | None = None) -> None:
        """Sends how much of the prompt has been read, by default what is in the cache."""
        num_prompt = sequence.num_prompt_tokens
        if num_read is None:
            num_read = sequence.num_tokens - sequence.num_unread
        request_id, num_cached = sequence.request.request_id, sequence.num_cached_tokens
        phase: PrefillPhase = "restoring" if sequence.state is State.RESTORING else "reading"
        self._send(Progress(request_id, min(num_read, num_prompt), num_prompt, num_cached, phase))

    def tell_layers(self, one: Pass) -> None:
        """Sends how far each prompt of a pass has come: its rows count by the share of the layers done."""
        for index, part in enumerate(one.parts):
            num_done = part.num_rows * one.num_layers_done // self._model.num_layers
            if num_done and not part.sequence.generated and not part.sequence.is_cancelled:
                self.tell_progress(part.sequence, one.length_before(index) + num_done)

    def save(self, sequence: Sequence) -> None:
        """Offers the rows of a sequence's cache to the prefix cache. A request does not fail for that."""
        message = "request %s: its prompt was not saved, so the next one reads it again"
        with Contained(lambda error: log.error(message, sequence.request.request_id, exc_info=error)):
            self._prefixes.save(sequence)

    def _hand_out(self, complete: list[tuple[Sequence, int]], hidden: mx.array) -> None:
        for sequence, _ in complete:
            if sequence.request.max_tokens == 0:
                self._finish(sequence)
        drawing = [item for item in complete if item[0].request.max_tokens]
        for first in range(0, len(drawing), self._max_rows):
            group = drawing[first : first + self._max_rows]
            rows = mx.array([row for _, row in group])
            self._sample([sequence for sequence, _ in group], self._model.logits(hidden[rows]))

    def _sample(self, sequences: list[Sequence], logits: mx.array) -> None:  # [M, V]
        drawn = self._draw(sequences, logits)
        if not drawn:
            return
        if len(drawn) < len(sequences):
            logits = logits[mx.array([row for row, _, _ in drawn])]
        num_top = max(sequences[row].request.num_top_logprobs for row, _, _ in drawn)
        with Contained(lambda error: self._fail_all([sequences[row] for row, _, _ in drawn], error)) as step:
            scores = score_tokens(logits, mx.stack([token for _, token, _ in drawn]), num_top)
        if step.failed:
            return
        for (row, _, state), score in zip(drawn, scores, strict=True):
            with Contained(partial(self.fail, sequences[row])):
                self._accept(sequences[row], state, score)

    def _draw(self, sequences: list[Sequence], logits: mx.array) -> list[tuple[int, mx.array, SamplerState]]:
        drawn = []
        for row, sequence in enumerate(sequences):
            with Contained(partial(self.fail, sequence)):
                allowed = sequence.constraint.apply(logits[row])
                drawn.append((row, *draw(allowed, sequence.request.sampling, sequence.sampler)))
        return drawn

    def _fail_all(self, sequences: list[Sequence], error: Exception) -> None:
        for sequence in sequences:
            self.fail(sequence, error)

    def _accept(self, sequence: Sequence, state: SamplerState, score: TokenScore) -> None:
        request = sequence.request
        _check_finite([score])
        sequence.sampler = state
        sequence.append(score.token_id)
        sequence.constraint.accept(score.token_id)
        if score.token_id not in request.stop_token_ids:
            top = score.top[: request.num_top_logprobs]
            self._send(Token(request.request_id, TokenScore(score.token_id, score.logprob, top)))
        if sequence.finish_reason():
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason()
        assert reason, "only a complete sequence is finished"
        self.save(sequence)
        self._scheduler.retire(sequence)
        stop_token_id = sequence.generated[-1] if reason == "stop" else None
        self._send(Finished(sequence.request.request_id, reason, sequence.usage, stop_token_id))

    def _score_prompt(self, sequence: Sequence, hidden: mx.array) -> None:
        """The last rows of the cache were just computed; row i predicts token i + 1, the last one none.

        Tokens that were scored before the cache was taken away are not scored again.
        """
        request, prompt = sequence.request, sequence.request.token_ids
        first = sequence.num_tokens - sequence.num_unread - hidden.shape[0]
        scores = [TokenScore(prompt[0], None)] if sequence.num_scored == 0 else []
        for start in range(max(first, sequence.num_scored - 1, 0), first + hidden.shape[0], SCORED_ROWS):
            targets = prompt[start + 1 : min(start + SCORED_ROWS, first + hidden.shape[0]) + 1]
            if targets:
                logits = self._model.logits(hidden[start - first : start - first + len(targets)])
                scores += score_tokens(logits, mx.array(list(targets)), request.num_top_logprobs)
        _check_finite(scores)
        sequence.num_scored += len(scores)
        if scores:
            self._send(PromptScored(request.request_id, tuple(scores)))


def kind_of(error: Exception) -> FailureKind:
    """The kind of failure that an error is, for the client."""
    match error:
        case RequestError():
            return "request"
        case CheckpointChanged():
            return "changed"
        case DiskError():
            return "disk"
        case _:
            return "engine"


def _check_rows(hidden: mx.array) -> None:  # [n, H]
    """Raises EngineError if any hidden row is NaN: then the cache is damaged, too."""
    if mx.isnan(hidden.sum(axis=-1)).any().item():
        raise _not_a_number()


def _check_finite(scores: list[TokenScore]) -> None:
    if any(score.logprob is not None and math.isnan(score.logprob) for score in scores):
        raise _not_a_number()


class NotANumber(EngineError):
    """The model computed NaN. Told to the client as any fault of the engine is."""


def _not_a_number() -> NotANumber:
    return NotANumber("the model computed NaN; its weights are damaged or its arithmetic overflowed")
