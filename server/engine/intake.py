"""Requests as they come: each becomes a sequence that waits for its turn, or is answered at once.

Called by the engine's loop, on its thread.
"""

from collections.abc import Callable
from functools import partial

from config.errors import RequestError
from server.engine.answers import kind_of
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import start_sampling
from server.engine.decode.token_masks import Grammars
from server.engine.faults import Contained
from server.engine.schedule.limits import Limits
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import Sequence
from server.link.messages import Event, Failed, Finished, Generate, ModelInfo, Usage


class Reception:
    """Checks requests and hands them to the scheduler."""

    def __init__(
        self,
        info: ModelInfo,
        limits: Limits,
        scheduler: Scheduler,
        grammars: Grammars | None,
        send: Callable[[Event], None],
    ) -> None:
        self._info, self._scheduler, self._grammars, self._send = info, scheduler, grammars, send
        self._most_tokens = min(info.context_length, limits.kv_tokens)

    def receive(self, request: Generate) -> None:
        """Queues a request, or refuses one that could never be answered, with the numbers."""
        num_tokens = len(request.token_ids) + request.max_tokens
        if not request.token_ids or num_tokens > self._most_tokens:
            message = f"{num_tokens} tokens do not fit a context of {self._most_tokens}"
            self._send(Failed(request.request_id, "request", message))
            return
        if request.max_tokens == 0 and not request.score_prompt:
            self._send(Finished(request.request_id, "length", Usage(len(request.token_ids), 0)))
            return
        with Contained(partial(self._refuse, request)) as attempt:
            constraint = self._make_constraint(request)
        if attempt.failed:
            return
        sampler = start_sampling(request.sampling, request.token_ids, self._info.vocab_size)
        self._scheduler.add(Sequence(request, sampler, constraint))

    def _refuse(self, request: Generate, error: Exception) -> None:
        self._send(Failed(request.request_id, kind_of(error), str(error)))

    def _make_constraint(self, request: Generate) -> Constraint:
        if not request.grammar:
            return Constraint(request, None)
        if self._grammars is None:
            raise RequestError("this engine was started without grammars")
        coming = self._grammars.begin_matcher(request.grammar, request.stop_token_ids, request.grammar_bytes)
        return Constraint(request, coming)
