"""Chooses who runs next. Owns the waiting and the running; called by the engine's thread only.

A sequence waits until it is admitted: then its KV is set aside and it has a cache. It reads in parts, each
in a pass that others may share, and decodes in steps that all running ones share, or take turns in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from config.plan import MAX_RUNNING
from server.engine.schedule.fairness import AGING_S, Shares
from server.engine.schedule.limits import Limits
from server.engine.schedule.sequence import Sequence

# Tokens of an answer for which room is set aside on admission. Longer answers take it as they grow.
KV_HEADROOM = 256
# Steps of a turn, where more sequences decode than the batch is wide: few changes keep experts in memory.
TURN_STEPS = 8
# A prompt is short up to this part of a pass's rows, and so much of a pass is for short prompts first.
SHORT, FOR_SHORT = 1 / 8, 1 / 4
# Up to this part of the longest prompt in a pass another does better in a pass of its own, though that reads
# the experts once more: published for the target, one reading hides the compute of some 8,000 rows, not more.
TINY = 1 / 32


@dataclass(frozen=True)
class PassPart:
    """The next `num_rows` tokens of a sequence, to be read in a pass.

    If the sequence has a leader, a part of that stands before it in the same pass, or has been read.
    """

    sequence: Sequence
    num_rows: int


class Scheduler:
    """The waiting, the running, and the order among them."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []  # in order of admission
        self._in_pass: set[Sequence] = set()
        self._left_out: set[Sequence] = set()  # had a prompt to read, or a leader, when others boarded last
        self._turn: list[Sequence] = []
        self._turn_steps = 0
        self._row_s = 0.0  # measured: seconds of a prompt's row
        self.shares = Shares()

    # who is here

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrived_s = sequence.served_s = self._clock()
        self.shares.join(sequence.request.agent)
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a sequence. A running one is only marked: its step may be under way."""
        for sequence in [*self._waiting, *self._running]:
            if sequence.request.request_id == request_id:
                sequence.is_cancelled = True
        for sequence in [item for item in self._waiting if item.is_cancelled]:
            self._waiting.remove(sequence)
            sequence.constraint.give_up()
            self.shares.leave(sequence.request.agent)

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence that is complete, failed or cancelled, and give its cache back."""
        self._running.remove(sequence)
        self._in_pass.discard(sequence)
        self._left_out.discard(sequence)
        sequence.cache = sequence.leader = sequence.restoring = None
        self.shares.leave(sequence.request.agent)

    @property
    def cancelled(self) -> list[Sequence]:
        """Cancelled sequences that no pass holds."""
        return [item for item in self._running if item.is_cancelled and item not in self._in_pass]

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self._running and not self._waiting

    @property
    def is_resting(self) -> bool:
        """Whether nobody runs, and nobody who waits could."""
        return not self._running and not any(item.constraint.is_ready for item in self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences without a cache."""
        return len(self._waiting)

    @property
    def line(self) -> list[Sequence]:
        """Who waits, in the order of their turns as things stand."""
        return self.shares.rank(self._waiting, self._clock(), self._cost)

    @property
    def num_running(self) -> int:
        """Sequences with a cache."""
        return len(self._running)

    @property
    def num_kv_tokens(self) -> int:
        """Room in the KV that is taken or promised."""
        return sum(sequence.kv_tokens for sequence in self._running)

    # what runs next

    def admit(self) -> list[Sequence]:
        """Move those into the running whose turn it is and whose KV fits; they need caches now.

        Whoever's grammar is still being read waits for it here, and keeps nobody else waiting.
        """
        admitted: list[Sequence] = []
        now_s = self._clock()
        for sequence in self.shares.rank(self._waiting, now_s, self._cost):
            if len(self._running) >= MAX_RUNNING:
                break
            if self._num_inflight(sequence.request.agent) >= self._limits.agent_inflight:
                continue
            if not sequence.constraint.is_ready:
                continue
            most = sequence.num_prompt_tokens + sequence.request.max_tokens + 1
            promise = min(sequence.num_tokens + 1 + KV_HEADROOM, most)
            if self.num_kv_tokens + promise > self._limits.kv_tokens and self._running:
                # Its own wait counts, not its agent's: one agent's small ones would overtake it for ever.
                if now_s - sequence.served_s > AGING_S:
                    break
                continue
            sequence.promised_tokens = promise
            self._waiting.remove(sequence)
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    @property
    def has_readers(self) -> bool:
        """Whether anybody has a prompt to read and no pass."""
        return bool(self._readers())

    def has_reader_for(self, parts: list[PassPart]) -> bool:
        """Whether anybody would board with these who has come since: those left out would be so again.

        Whose prompt is tiny beside the longest would not, unless it follows one of them.
        """
        tiny = TINY * max(part.num_rows for part in parts)
        come = [item for item in self._readers() if item.num_unread > tiny]
        come += self._followers_of(parts)
        return any(item not in self._left_out for item in come)

    def board(self, num_rows: int) -> list[PassPart]:
        """Parts of prompts for a pass over at most so many rows: some room for short ones, then by turn.

        Those that are tiny beside the longest stay out: `board_short` is theirs. Where there is room, whoever
        waits for what is read now comes along.
        """
        ranked = self.shares.rank(self._readers(), self._clock(), self._cost)
        parts = self._take_whole(ranked, int(num_rows * FOR_SHORT), int(num_rows * SHORT))
        left, taken = num_rows - sum(part.num_rows for part in parts), {part.sequence for part in parts}
        for sequence in ranked:
            if sequence not in taken and left:
                parts.append(_next_part(sequence, left))
                left -= parts[-1].num_rows
        tiny = TINY * max((part.num_rows for part in parts), default=0)
        parts = [part for part in parts if part.sequence.num_unread > tiny]
        left = num_rows - sum(part.num_rows for part in parts)
        while left and (following := self._followers_of(parts)):
            parts.append(_next_part(following[0], left))
            left -= parts[-1].num_rows
        self._in_pass |= {part.sequence for part in parts}
        self._left_out = {*self._readers(), *(item for item in self.followers if item.leader)}
        return parts

    def board_short(self, num_rows: int) -> list[PassPart]:
        """Prompts that fit whole into a pass over at most `num_rows` rows."""
        ranked = self.shares.rank(self._readers(), self._clock(), self._cost)
        parts = self._take_whole(ranked, num_rows, num_rows)
        self._in_pass |= {part.sequence for part in parts}
        return parts

    def _readers(self) -> list[Sequence]:
        reading = [item for item in self._running if not item.is_decoding and not item.is_held]
        return [item for item in reading if item not in self._in_pass and not item.is_cancelled]

    def _followers_of(self, parts: list[PassPart]) -> list[Sequence]:
        """Those whose leader's part ends the wait: behind it they can read on in the same pass.

        Beside them no prompt may be tiny that would do without them.
        """
        stops = {
            part.sequence: part.sequence.num_before + part.num_rows
            for part in parts
            if not part.sequence.is_cancelled
        }
        most = min((part.num_rows for part in parts if not part.sequence.leader), default=0) / TINY
        return [
            item
            for item in self.followers
            if item not in stops
            and item.leader in stops
            and item.follows_to <= stops[item.leader]
            and item.num_tokens - item.follows_to < most
        ]

    @staticmethod
    def _take_whole(ranked: list[Sequence], num_rows: int, most_each: int) -> list[PassPart]:
        parts: list[PassPart] = []
        for sequence in ranked:
            if sequence.num_unread <= min(num_rows, most_each):
                parts.append(PassPart(sequence, sequence.num_unread))
                num_rows -= sequence.num_unread
        return parts

    def leave_pass(self, parts: list[PassPart]) -> None:
        """The pass of these parts is over or given up."""
        self._in_pass -= {part.sequence for part in parts}

    def decode_batch(self, choose_width: Callable[[int], int]) -> list[Sequence]:
        """Who decodes in the next step: all, or those whose turn it is where fewer are chosen."""
        decoding = [item for item in self._running if item.is_decoding and item not in self._in_pass]
        width = choose_width(len(decoding))
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
        """The youngest outside a pass, where the running have outgrown the KV."""
        if self.num_kv_tokens <= self._limits.kv_tokens or len(self._running) < 2:
            return None
        return next((item for item in reversed(self._running) if item not in self._in_pass), None)

    def suspend(self, sequence: Sequence) -> None:
        """Take the cache away; the sequence waits and will read all its tokens again."""
        self._running.remove(sequence)
        self._left_out.discard(sequence)
        sequence.cache = sequence.leader = sequence.restoring = None
        self._waiting.insert(0, sequence)

    @property
    def followers(self) -> list[Sequence]:
        """Those outside a pass that wait for what another reads, or for what was saved of them."""
        held = [item for item in self._running if item.is_held and item not in self._in_pass]
        return [item for item in held if not item.is_cancelled]

    @property
    def has_decoders(self) -> bool:
        """Whether anybody decodes."""
        return any(item.is_decoding for item in self._running)

    def charge(self, parts: list[PassPart], seconds: float) -> None:
        """Divide the time of a step between those who had a part in it, by rows."""
        now_s, num_rows = self._clock(), sum(part.num_rows for part in parts)
        for part in parts:
            self.shares.charge(part.sequence, seconds * part.num_rows / num_rows, now_s)

    def note_pass(self, num_rows: int, seconds: float) -> None:
        """A whole pass took so long: what prompts are expected to cost."""
        self._row_s = seconds / num_rows

    def check_integrity(self) -> None:
        """The books balance."""
        assert not set(self._waiting) & set(self._running), "a sequence both waits and runs"
        assert all(item.cache is None for item in self._waiting), "a sequence that waits holds a cache"
        assert self._in_pass <= set(self._running), "a pass holds a sequence that does not run"
        assert self._running or not self._in_pass
        self.shares.check_integrity()

    def _cost(self, sequence: Sequence) -> float:
        return self._row_s * sequence.num_unread

    def _num_inflight(self, agent: str) -> int:
        return sum(item.request.agent == agent and not item.is_cancelled for item in self._running)


def _next_part(sequence: Sequence, num_rows: int) -> PassPart:
    """What it has to read next, up to so many rows."""
    return PassPart(sequence, min(num_rows, sequence.num_tokens - sequence.num_before))
