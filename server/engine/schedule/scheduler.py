"""Chooses which sequences run. Owns the waiting and the running; called by the engine's thread only.

How sequences board passes over prompts stands in `boarding.py`, the order of turns in `fairness.py`.
"""

from collections.abc import Callable, Iterable
from time import monotonic

from models.attention.cache import SequenceCache
from server.engine.schedule.fairness import AGING_S, Shares
from server.engine.schedule.limits import Limits
from server.engine.schedule.sequence import PassPart, Sequence, State

# Tokens of an answer for which room is set aside on admission. Longer answers take it as they grow.
KV_HEADROOM = 256
# Steps of a turn, where more sequences decode than the batch is wide: few changes keep experts in memory.
TURN_STEPS = 8


class Scheduler:
    """The waiting, the running, and the order among them."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order of admission; for others to read
        self._turn: list[Sequence] = []
        self._turn_steps = 0
        self._row_s = 0.0  # measured: seconds of a prompt's row
        self.shares = Shares()

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence into the line."""
        sequence.arrived_s = sequence.served_s = self._clock()
        self.shares.join(sequence.request.agent)
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a waiting sequence. A running one is only marked, because its step may be under way."""
        for sequence in [*self._waiting, *self.running]:
            if sequence.request.request_id == request_id:
                sequence.is_cancelled = True
        for sequence in [item for item in self._waiting if item.is_cancelled]:
            self._waiting.remove(sequence)
            sequence.constraint.give_up()
            sequence.end()
            self.shares.leave(sequence.request.agent)

    def retire(self, sequence: Sequence) -> None:
        """Ends a running sequence that is complete, failed or cancelled."""
        self.running.remove(sequence)
        sequence.end()
        self.shares.leave(sequence.request.agent)

    @property
    def cancelled(self) -> list[Sequence]:
        """Running sequences whose clients left, and that no pass holds."""
        return [item for item in self.running if item.is_cancelled and not item.is_boarded]

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""
        return not self.running and not self._waiting

    @property
    def is_resting(self) -> bool:
        """Whether all sequences, running or not, wait for their grammars."""
        if self.running:
            return all(
                item.state is State.DECODING and item.constraint.is_slow and not item.is_cancelled
                for item in self.running
            )
        return not any(item.constraint.is_ready for item in self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences without a cache."""
        return len(self._waiting)

    @property
    def line(self) -> list[Sequence]:
        """Waiting sequences, in the order of their turns as things stand."""
        return self.rank(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a cache."""
        return len(self.running)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of KV that running sequences take or were promised."""
        return sum(sequence.kv_tokens for sequence in self.running)

    def admit(self, make_cache: Callable[[], SequenceCache]) -> list[Sequence]:
        """Gives caches to the sequences whose turn it is and whose KV fits; returns them.

        A sequence whose grammar is still being read waits for it and keeps no other waiting.
        """
        admitted: list[Sequence] = []
        now_s = self._clock()
        for sequence in self.line:
            if len(self.running) >= self._limits.max_running:
                break
            if self._num_inflight(sequence.request.agent) >= self._limits.agent_inflight:
                continue
            if not sequence.constraint.is_ready:
                continue
            most = sequence.num_prompt_tokens + sequence.request.max_tokens + 1
            promise = min(sequence.num_tokens + 1 + KV_HEADROOM, most)
            if self.num_kv_tokens + promise > self._limits.kv_tokens and self.running:
                # Its own wait counts, not its agent's: one agent's small ones would overtake it for ever.
                if now_s - sequence.served_s > AGING_S:
                    break
                continue
            sequence.promised_tokens = promise
            self._waiting.remove(sequence)
            self.running.append(sequence)
            sequence.admit(make_cache())
            admitted.append(sequence)
        return admitted

    def rank(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The sequences in the order of their turns as things stand."""
        return self.shares.rank(sequences, self._clock(), self._cost)

    def decode_batch(self) -> list[Sequence]:
        """The sequences of the next decode step: all that decode, or as many as fit, by turns.

        Those whose grammar is slow to say what may come next sit out.
        """
        decoding = [item for item in self.running if item.state is State.DECODING and not item.is_boarded]
        decoding = [item for item in decoding if not item.constraint.is_slow]
        width = self._limits.batch_width or self._limits.decode_rows
        if len(decoding) <= width:
            return decoding
        here = set(decoding)
        is_whole = len(self._turn) == width and here.issuperset(self._turn)
        if not is_whole or self._turn_steps >= TURN_STEPS:
            oldest_first = sorted(decoding, key=lambda item: item.served_s)
            self._turn = self.shares.rank(oldest_first, self._clock())[:width]
            self._turn_steps = 0
        self._turn_steps += 1
        return self._turn

    def find_victim(self) -> Sequence | None:
        """The youngest sequence outside a pass if the running ones have outgrown the KV, else None."""
        if self.num_kv_tokens <= self._limits.kv_tokens or len(self.running) < 2:
            return None
        return next((item for item in reversed(self.running) if not item.is_boarded), None)

    def suspend(self, sequence: Sequence) -> None:
        """Takes the cache away; the sequence waits, first in line, and will read all its tokens again."""
        self.running.remove(sequence)
        sequence.suspend()
        self._waiting.insert(0, sequence)

    @property
    def followers(self) -> list[Sequence]:
        """Sequences outside a pass that wait for rows that another computes, or for saved ones."""
        return [item for item in self.running if item.is_held and not (item.is_boarded or item.is_cancelled)]

    @property
    def has_decoders(self) -> bool:
        """Whether any sequence decodes."""
        return any(item.state is State.DECODING for item in self.running)

    def charge(self, parts: list[PassPart], seconds: float) -> None:
        """Divides the time of a step between the agents that had a part in it, by rows."""
        now_s, num_rows = self._clock(), sum(part.num_rows for part in parts)
        for part in parts:
            self.shares.charge(part.sequence, seconds * part.num_rows / num_rows, now_s)

    def note_pass(self, num_rows: int, seconds: float) -> None:
        """Records the time of a whole pass, from which the cost of prompts is expected."""
        self._row_s = seconds / num_rows

    def check_integrity(self) -> None:
        """Checks that states, leaders and caches agree."""
        assert all(item.state is State.WAITING for item in self._waiting), "a sequence in line does not wait"
        assert all(item.cache is not None for item in self.running), "a running sequence has no cache"
        for item in self.running:
            assert (item.leader is not None) == (item.state is State.FOLLOWING), "a leader without a follower"
            assert (item.restoring is not None) == (item.state is State.RESTORING), "nobody awaits rows"
        self.shares.check_integrity()

    def _cost(self, sequence: Sequence) -> float:
        return self._row_s * sequence.num_unread

    def _num_inflight(self, agent: str) -> int:
        return sum(item.request.agent == agent and not item.is_cancelled for item in self.running)
