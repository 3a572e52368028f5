"""The engine's loop: take commands, choose, run one step, hand out tokens.

Runs on the thread that opened the model, the only one that touches MLX. Commands arrive in a queue that
another thread fills; events leave through `send`.
"""

import logging
import math
from collections.abc import Callable
from queue import SimpleQueue

import mlx.core as mx

from config.errors import DiskError, EngineError, RequestError
from models.attention import Span
from server.engine.constraint import Constraint
from server.engine.grammar import Grammars
from server.engine.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    FailureKind,
    Finished,
    Generate,
    Progress,
    PromptScored,
    Shutdown,
    Token,
    TokenScore,
    Usage,
)
from server.engine.model import Backend
from server.engine.sampling import draw, score_tokens, start_sampling
from server.engine.scheduler import Decode, Prefill, Scheduler
from server.engine.sequence import Sequence

# Rows whose logits are held at once while a prompt is scored: 64 x 154,880 x 4 bytes = 40 MB.
SCORED_ROWS = 64

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The sequence of the current step is no longer wanted."""


class EngineLoop:
    """Serves commands until Shutdown."""

    def __init__(
        self,
        backend: Backend,
        inbox: SimpleQueue[Command],
        send: Callable[[Event], None],
        scheduler: Scheduler | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._model = backend.model
        self._info = backend.info
        self._inbox = inbox
        self._send = send
        self._scheduler = scheduler or Scheduler(backend.sweep_tokens)
        self._grammars = grammars
        self._is_stopping = False

    def run(self) -> None:
        """Step until told to stop."""
        while not self._is_stopping:
            self._take_commands(wait=self._scheduler.is_idle)
            self._step()

    def _take_commands(self, wait: bool = False) -> None:
        while wait or not self._inbox.empty():
            self._obey(self._inbox.get())
            wait = False

    def _obey(self, command: Command) -> None:
        match command:
            case Generate():
                self._admit(command)
            case Cancel(request_id):
                self._scheduler.cancel(request_id)
            case Shutdown():
                self._is_stopping = True
            case _:
                raise AssertionError(f"the loop was sent {command!r}")

    def _admit(self, request: Generate) -> None:
        num_tokens = len(request.token_ids) + request.max_tokens
        if not request.token_ids or num_tokens > self._info.context_length:
            message = f"{num_tokens} tokens do not fit a context of {self._info.context_length}"
            self._send(Failed(request.request_id, "request", message))
            return
        if request.max_tokens == 0 and not request.score_prompt:
            self._send(Finished(request.request_id, "length", Usage(len(request.token_ids), 0)))
            return
        try:
            constraint = self._make_constraint(request)
        except Exception as error:  # a grammar that cannot be followed ends its own request only
            self._send(Failed(request.request_id, _kind(error), str(error)))
            return
        sampler = start_sampling(request.sampling, request.token_ids, self._info.vocab_size)
        self._scheduler.add(Sequence(request, self._model.make_cache(), sampler, constraint))

    def _make_constraint(self, request: Generate) -> Constraint:
        if not request.grammar:
            return Constraint(request, None)
        if self._grammars is None:
            raise RequestError("this engine was started without grammars")
        return Constraint(request, self._grammars.make_matcher(request.grammar, request.stop_token_ids))

    def _step(self) -> None:
        work = self._scheduler.choose()
        if work is None:
            return
        try:
            match work:
                case Prefill(sequence, num_rows):
                    self._prefill(sequence, num_rows)
                case Decode(sequence):
                    self._decode(sequence)
        except Cancelled:
            self._scheduler.retire(work.sequence)
        except Exception as error:  # a request ends here: its client is told, the others go on
            log.exception("request %s failed", work.sequence.request.request_id)
            self._fail(work.sequence, error)

    def _prefill(self, sequence: Sequence, num_rows: int) -> None:
        start = sequence.cache.length
        token_ids = sequence.request.token_ids[start : start + num_rows]
        hidden = self._forward(sequence, token_ids)
        if sequence.request.score_prompt:
            self._score_prompt(sequence, start, hidden)
        request_id = sequence.request.request_id
        self._send(Progress(request_id, start + num_rows, sequence.num_prompt_tokens))
        if sequence.num_unread:
            mx.eval(hidden)
        elif sequence.request.max_tokens:
            self._sample(sequence, hidden[-1:])
        else:
            self._finish(sequence)

    def _decode(self, sequence: Sequence) -> None:
        self._sample(sequence, self._forward(sequence, (sequence.generated[-1],)))

    def _forward(self, sequence: Sequence, token_ids: tuple[int, ...]) -> mx.array:  # [N, H]
        layers = self._model.forward(mx.array(token_ids), [Span(sequence.cache, 0, len(token_ids))])
        written: list[mx.array] = []
        try:
            while True:
                written += sequence.cache.states(next(layers))
                self._take_commands()
                if sequence.is_cancelled or self._is_stopping:
                    raise Cancelled
        except StopIteration as end:
            hidden: mx.array = end.value
            # index keys that nothing has read yet would otherwise stay pending, step after step
            mx.async_eval(hidden, *written)  # type: ignore[no-untyped-call]
            return hidden
        finally:
            layers.close()

    def _score_prompt(self, sequence: Sequence, start: int, hidden: mx.array) -> None:
        """Row i of `hidden` predicts prompt token start + i + 1; the last row of all predicts none."""
        request = sequence.request
        targets = request.token_ids[start + 1 : start + 1 + hidden.shape[0]]
        scores = [TokenScore(request.token_ids[0], None)] if start == 0 else []
        for first in range(0, len(targets), SCORED_ROWS):
            part = targets[first : first + SCORED_ROWS]
            logits = self._model.logits(hidden[first : first + len(part)])
            scores += score_tokens(logits, mx.array(part), request.num_top_logprobs)
        _check_finite(scores)
        self._send(PromptScored(request.request_id, tuple(scores)))

    def _sample(self, sequence: Sequence, hidden: mx.array) -> None:  # [1, H]
        request = sequence.request
        logits = self._model.logits(hidden)
        token, sequence.sampler = draw(
            sequence.constraint.apply(logits[0]), request.sampling, sequence.sampler
        )
        [score] = score_tokens(logits, token[None], request.num_top_logprobs)
        _check_finite([score])
        sequence.generated.append(score.token_id)
        sequence.constraint.accept(score.token_id)
        if score.token_id not in request.stop_token_ids:
            self._send(Token(request.request_id, score))
        if sequence.finish_reason():
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason()
        assert reason, "only a complete sequence is finished"
        stop_token_id = sequence.generated[-1] if reason == "stop" else None
        self._scheduler.retire(sequence)
        self._send(Finished(sequence.request.request_id, reason, sequence.usage, stop_token_id))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._scheduler.retire(sequence)
        self._send(Failed(sequence.request.request_id, _kind(error), str(error) or type(error).__name__))


def _kind(error: Exception) -> FailureKind:
    match error:
        case RequestError():
            return "request"
        case DiskError():
            return "disk"
        case _:
            return "engine"


def _check_finite(scores: list[TokenScore]) -> None:
    if any(score.logprob is not None and math.isnan(score.logprob) for score in scores):
        raise EngineError("the model computed NaN; its weights are damaged or its arithmetic overflowed")
