"""The engine's loop: take commands, choose, run one step, hand out tokens.

A step is a decode step of all that decode, or one layer of a pass over prompts, or a part of one. Runs on the
thread that opened the model, the only one that touches MLX. Commands arrive in a queue that another thread
fills; events leave through `send`.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic

import mlx.core as mx

from server.engine.answers import Answers
from server.engine.decode.token_masks import Grammars
from server.engine.faults import Contained
from server.engine.intake import Reception
from server.engine.model_protocol import Backend
from server.engine.schedule.boarding import FEW_ROWS, Boarding
from server.engine.schedule.decode_share import Pace
from server.engine.schedule.passes import Pass
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import PassPart, Sequence, State
from server.engine.schedule.shared_prefixes import NoPrefixes, Prefixes
from server.engine.trials import Trials
from server.link.messages import (
    Administer,
    Administered,
    Cancel,
    Command,
    Event,
    Failed,
    Generate,
    Ping,
    Pong,
    Queued,
    Relay,
    Replan,
    Shutdown,
)

# How often the progress of a pass is told, at most; a shorter one is told when it is complete.
PROGRESS_S = 1.0
# How often commands are looked at while no sequence runs and all that wait do so for their grammars.
GRAMMAR_WAIT_S = 0.02

log = logging.getLogger(__name__)


class EngineLoop:
    """Serves commands until Shutdown.

    `beat` is called before each layer, each part of one and each step, and, with True, before the loop waits
    for commands.
    """

    def __init__(
        self,
        backend: Backend,
        inbox: SimpleQueue[Command],
        send: Callable[[Event], None],
        *,
        grammars: Grammars | None = None,
        prefixes: Prefixes | None = None,
        beat: Callable[[bool], None] = lambda is_idle: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._model, self._limits, self._memory = backend.model, backend.limits, backend.memory
        self._hot_set = backend.hot_set
        self._inbox, self._send, self._beat, self._clock = inbox, send, beat, clock
        self._prefixes = prefixes or NoPrefixes()
        self._scheduler = Scheduler(self._limits, clock)
        self._reception = Reception(backend.info, self._limits, self._scheduler, grammars, send)
        self._pace = Pace(self._limits.decode_share)
        self._answers = Answers(
            self._model, self._scheduler, self._prefixes, send, max_rows=self._limits.decode_rows
        )
        self._trials = Trials(backend.habits)
        self._boarding = Boarding(self._model, self._scheduler, self._limits)
        self._places: dict[str, int] = {}  # what waiting requests were told
        self._yielded_s = 0.0  # by the decode step under way, to short prompts
        self._is_stopping = False

    def run(self) -> None:
        """Runs steps until told to stop."""
        self._take_commands(wait=not self._brings_back())
        while not self._is_stopping:
            while self._memory.govern():
                self._beat(False)
            self._step()
            self._beat(self._scheduler.is_idle)
            self._take_commands(wait=self._scheduler.is_resting and not self._brings_back())
        for one in self._boarding.passes:
            one.abandon()
        if self._hot_set:
            self._hot_set.save()

    def check_integrity(self) -> None:
        """Checks that the books of sequences and passes balance."""
        self._scheduler.check_integrity()
        self._boarding.check_integrity()

    def measure(self) -> dict[str, float]:
        """Counts of requests and agents now, for /metrics."""
        return {
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "agents": self._scheduler.shares.num_agents,
            "kv_tokens": self._scheduler.num_kv_tokens,
            "kv_capacity": self._limits.kv_tokens,
            "batch_width": self._limits.batch_width or self._limits.decode_rows,
            **self._trials.measure(),
        }

    # commands

    def _take_commands(self, wait: bool = False) -> None:
        """Obeys all commands that have come.

        `wait`: rests until one comes, or memory or a grammar needs a look.
        """
        if wait:
            with suppress(Empty):
                pause_s = self._memory.pause_s if self._scheduler.is_idle else GRAMMAR_WAIT_S
                self._obey(self._inbox.get(timeout=pause_s))
        while not self._inbox.empty():
            self._obey(self._inbox.get())

    def _obey(self, command: Command) -> None:
        match command:
            case Generate():
                self._reception.receive(command)
            case Cancel(request_id):
                self._scheduler.cancel(request_id)
            case Administer():
                answer = self._prefixes.administer(command)
                answer.add_done_callback(partial(self._pass_on, command.request_id))
            case Relay(event):
                self._send(event)
            case Replan():
                self._send(self._memory.replan(command))
            case Ping():
                self._send(Pong())
            case Shutdown():
                self._is_stopping = True
            case _:
                raise AssertionError(f"the loop was sent {command!r}")

    def _pass_on(self, request_id: str, answer: "Future[Administered]") -> None:
        """Has the loop send what another thread has found; that thread calls this."""
        error = answer.exception()
        failed = Failed(request_id, "disk", f"the saved prompts cannot be changed: {error}")
        self._inbox.put(Relay(failed if error else answer.result()))

    def _brings_back(self) -> bool:
        """Where nothing else is to be done: some of the experts that were in memory before a restart."""
        return self._hot_set is not None and self._scheduler.is_idle and self._hot_set.advance()

    # choosing

    def _step(self) -> None:
        self._clear_away()
        self._admit()
        self._tell_places()
        self._settle()
        self._boarding.update(self._prefixes.keeps_rows)
        batch = self._scheduler.decode_batch()
        if batch and not (self._boarding.passes and not self._pace.is_step_due(len(batch))):
            self._decode(batch)
        elif self._boarding.passes:
            self._advance(self._boarding.next(), is_contended=bool(batch))

    def _clear_away(self) -> None:
        """Ends cancelled sequences; lets the youngest wait again if the running ones have outgrown the KV."""
        for sequence in self._scheduler.cancelled:
            self._answers.save(sequence)
            self._scheduler.retire(sequence)
        while victim := self._scheduler.find_victim():
            log.info("request %s gives its place in the KV to others", victim.request.request_id)
            self._answers.save(victim)
            self._scheduler.suspend(victim)

    def _admit(self) -> None:
        for sequence in self._scheduler.admit(self._model.make_cache):
            # scores need the hidden rows of the whole prompt
            if self._answers.begin(sequence) and not sequence.request.score_prompt:
                self._prefixes.restore(sequence)
                if sequence.state is State.RESTORING:
                    self._answers.tell_progress(sequence)

    def _tell_places(self) -> None:
        places = {item.request.request_id: place for place, item in enumerate(self._scheduler.line)}
        for request_id, place in places.items():
            if self._places.get(request_id) != place:
                self._send(Queued(request_id, place))
        self._places = places

    def _settle(self) -> None:
        is_alone = not (self._boarding.passes or self._scheduler.has_decoders)
        for sequence in self._prefixes.settle(self._scheduler.followers, is_alone):
            self._answers.tell_progress(sequence)

    # running

    def _advance(self, one: Pass, *, is_contended: bool) -> None:
        started_s = self._clock()
        with Contained(partial(self._lose_pass, one)) as attempt:
            hidden = one.advance()
            if hidden is not None:
                mx.eval(hidden)
        if attempt.failed:
            return
        seconds = self._clock() - started_s
        self._boarding.charge(one, seconds)
        self._scheduler.charge(one.parts, seconds)
        if is_contended:
            self._pace.note_layer(seconds)
        is_amid = hidden is None and one.num_layers_done < self._model.num_layers
        if is_amid and one.seconds > one.told_s + PROGRESS_S:
            one.told_s = one.seconds
            self._answers.tell_layers(one)
        if hidden is not None:
            self._boarding.complete(one)
            self._trials.disturb()
            self._scheduler.note_pass(one.num_rows, one.seconds)
            self._answers.hand_out(one, hidden)

    def _decode(self, batch: list[Sequence]) -> None:
        started_s, self._yielded_s = self._clock(), 0.0
        step = Pass(self._model, [PassPart(sequence, 1) for sequence in batch])
        with Contained(partial(self._take_apart, step)) as attempt:
            hidden = self._run_through(step, self._let_by)
        if attempt.failed or hidden is None:
            return
        self._answers.hand_out(step, hidden)
        if self._hot_set:
            self._hot_set.save_when_due()
        seconds = self._clock() - started_s - self._yielded_s
        self._scheduler.charge(step.parts, seconds)
        self._pace.note_step(seconds, len(batch), is_disturbed=bool(self._boarding.passes))
        if not self._boarding.passes:
            self._trials.note(len(batch), seconds)

    def _let_by(self, step: Pass) -> None:
        """Reads short prompts that come during a decode step before its next layer.

        They may take the time that `--decode-share` leaves to prompts. Longer ones wait for the step's end.
        """
        if self._boarding.passes or not self._scheduler.num_waiting:
            return
        started_s = self._clock()
        self._admit()
        self._settle()
        self._boarding.update(self._prefixes.keeps_rows)
        while self._boarding.passes and not self._pace.is_step_due(len(step.parts)):
            one = self._boarding.next()
            if one.num_rows > FEW_ROWS:
                break
            self._advance(one, is_contended=True)
        self._yielded_s += self._clock() - started_s

    def _run_through(self, one: Pass, between: Callable[[Pass], None] = lambda _: None) -> mx.array | None:
        """Computes all layers at a stretch, and calls `between` after each but the last.

        Returns None if no client wants the result any more.
        """
        while True:
            hidden = one.advance()
            if hidden is not None:
                return hidden
            self._beat(False)
            self._take_commands()
            if self._is_stopping or not one.is_wanted:
                one.abandon()
                return None
            between(one)

    def _lose_pass(self, failed: Pass, error: Exception) -> None:
        self._boarding.give_up(failed)
        self._take_apart(failed, error)

    def _take_apart(self, failed: Pass, error: Exception) -> None:
        """Runs the parts of a failed pass one by one, so that only those fail that would fail alone."""
        failed.abandon()
        if len(failed.parts) == 1:
            self._answers.fail(failed.parts[0].sequence, error)
            return
        log.warning("a step of %d requests failed, each is tried alone: %s", len(failed.parts), error)
        for part in failed.parts:
            if part.sequence.is_cancelled or part.sequence.has_lost_leader:
                continue
            alone = Pass(self._model, [part])
            with Contained(partial(self._answers.fail, part.sequence)) as attempt:
                hidden = self._run_through(alone)
            if not attempt.failed and hidden is not None:
                self._answers.hand_out(alone, hidden)
