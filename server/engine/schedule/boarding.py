"""Which sequences board which pass over prompts, when, and why. Owns the passes; called by the engine's loop.

At most two passes are under way: one over all prompts that wait, and one over short prompts that came later
and would wait too long. A prompt that comes while a pass has hardly begun makes it start again with both.
"""

from server.engine.model_protocol import EngineModel
from server.engine.schedule.limits import Limits
from server.engine.schedule.passes import Pass
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import PassPart, Sequence, State, next_part

# A prompt is short up to this part of a pass's rows.
SHORT = 1 / 8
# This part of a pass's rows is for short prompts first.
FOR_SHORT = 1 / 4
# Up to this part of the longest prompt in a pass, a prompt does better in a pass of its own, though experts
# are then read twice: published for the target, one reading hides the compute of some 8,000 rows, not more.
TINY = 1 / 32
# A second pass has at most one row for this many rows of the first.
OVERTAKEN = 8
# A pass over so many rows is read amid a decode step, and goes before another, amid a layer of it too.
FEW_ROWS = 32
# A pass starts again with prompts that came later until this part of its layers is done. Layers that are lost
# so count together until a pass is complete, so that no more is lost however many prompts come.
RESTART = 0.1
# A pass that no client waits for is completed from this part of its layers on, for the prefix cache.
WORTH_ITS_END = 1 / 2


class Boarding:
    """The passes over prompts that are under way, and the rules by which sequences get into them."""

    def __init__(self, model: EngineModel, scheduler: Scheduler, limits: Limits) -> None:
        self.passes: list[Pass] = []
        self._model, self._scheduler, self._limits = model, scheduler, limits
        self._left_out: set[Sequence] = set()  # those that could not join when the first pass began
        self._num_lost_layers = 0  # of passes that were started again since one was complete
        self._owed_s = 0.0  # to passes over many rows, which one over few went before

    def update(self, keeps_rows: bool) -> None:
        """Gives up passes that are not worth their end, then starts one if prompts wait and may have one.

        `keeps_rows`: a prefix cache keeps what a pass computes, whether a client waits for it or not.
        """
        for one in list(self.passes):
            if not (one.is_wanted or (keeps_rows and self._is_worth_its_end(one))):
                self.give_up(one)
        if self.passes and self._starts_again(self.passes[0]):
            # Sequences that left are cleared away first, and their followers look for other leaders.
            self.give_up(self.passes[0])
        elif len(self.passes) < 2:
            self._start()

    def next(self) -> Pass:
        """The pass that goes on: one over few rows, whose time the other has next.

        Else one that is amid a layer, else the one that has had less time.
        """
        few = [one for one in self.passes if one.num_rows <= FEW_ROWS]
        if len(few) == 1 and (few[0].seconds or not self._owed_s):
            return few[0]
        return min(self.passes, key=lambda one: (not one.is_amid_layer, one.turn_s))

    def charge(self, one: Pass, seconds: float) -> None:
        """Notes the time that a pass has had."""
        one.seconds += seconds
        one.turn_s += seconds
        if one.num_rows > FEW_ROWS:
            self._owed_s = max(0.0, self._owed_s - seconds)
        elif len(self.passes) > 1:
            self._owed_s += seconds

    def complete(self, one: Pass) -> None:
        """Takes a pass off the list whose last layer is done."""
        self._leave(one)
        if one.num_rows > FEW_ROWS or not self.passes:
            self._num_lost_layers = 0

    def give_up(self, one: Pass) -> None:
        """Ends a pass early; caches are what they were before it."""
        one.abandon()
        self._leave(one)

    def check_integrity(self) -> None:
        """Checks that the flags of sequences and the passes agree."""
        assert len(self.passes) <= 2, "more than two passes are under way"
        held = {part.sequence for one in self.passes for part in one.parts}
        assert {item for item in self._scheduler.running if item.is_boarded} <= held, "a pass lost a sequence"

    def _leave(self, one: Pass) -> None:
        self.passes.remove(one)
        for sequence in (part.sequence for part in one.parts):
            sequence.is_boarded = False
            if sequence.state is State.READING:
                sequence.read_on()

    def _is_worth_its_end(self, one: Pass) -> bool:
        """Whether to complete a pass that no client waits for, because clients that gave up ask again.

        Others that wait for a pass are kept waiting for at most half of it, unless one of them follows it.
        """
        leaders = {part.sequence for part in one.parts}
        is_followed = any(item.leader in leaders for item in self._scheduler.followers)
        is_half_done = one.num_layers_done >= WORTH_ITS_END * self._model.num_layers
        is_contended = self._readers() or self._scheduler.num_waiting
        return bool(is_followed or is_half_done or not is_contended)

    def _starts_again(self, one: Pass) -> bool:
        """Whether a pass, the only one, has hardly begun and a prompt that came later could join it."""
        num_lost = self._num_lost_layers + one.num_layers_done + one.is_amid_layer
        if len(self.passes) > 1 or one.num_rows >= self._limits.pass_rows:
            return False
        if num_lost >= RESTART * self._model.num_layers or not self._has_newcomer(one.parts):
            return False
        self._num_lost_layers = num_lost
        return True

    def _has_newcomer(self, parts: list[PassPart]) -> bool:
        """Whether a sequence that came after these boarded would board with them."""
        tiny = TINY * max(part.num_rows for part in parts)
        come = [item for item in self._readers() if item.num_unread > tiny]
        return any(item not in self._left_out for item in [*come, *self._followers_of(parts)])

    def _start(self) -> None:
        if not (readers := self._scheduler.rank(self._readers())):
            return
        if self.passes:
            num_rows = self.passes[0].num_rows // OVERTAKEN
            parts = _whole_prompts(readers, num_rows, num_rows)
        else:
            parts = self._choose(readers, self._limits.pass_rows)
        for part in parts:
            part.sequence.is_boarded = True
        if not self.passes:
            waiting = (item for item in self._scheduler.followers if item.state is State.FOLLOWING)
            self._left_out = {*self._readers(), *waiting}
        if parts:
            for one in self.passes:
                one.turn_s = 0.0
            self.passes.insert(0, Pass(self._model, parts))

    def _choose(self, ranked: list[Sequence], num_rows: int) -> list[PassPart]:
        """Parts of prompts for a pass: short ones in rows of their own, then by turn, then followers.

        Prompts that are tiny beside the longest stay out; a second pass is theirs.
        """
        parts = _whole_prompts(ranked, int(num_rows * FOR_SHORT), int(num_rows * SHORT))
        left, taken = num_rows - _rows(parts), {part.sequence for part in parts}
        for sequence in ranked:
            if sequence not in taken and left:
                parts.append(next_part(sequence, left))
                left -= parts[-1].num_rows
        tiny = TINY * max(part.num_rows for part in parts)
        parts = [part for part in parts if part.sequence.num_unread > tiny]
        while (left := num_rows - _rows(parts)) and (following := self._followers_of(parts)):
            parts.append(next_part(following[0], left))
        return parts

    def _readers(self) -> list[Sequence]:
        """Sequences with a prompt to read and no pass."""
        reading = [item for item in self._scheduler.running if item.state is State.READING]
        return [item for item in reading if not (item.is_boarded or item.is_cancelled)]

    def _followers_of(self, parts: list[PassPart]) -> list[Sequence]:
        """Sequences that can read on in the same pass, because a leader's part ends where they begin.

        A prompt of these parts that has no leader must not be tiny beside them.
        """
        stops = {
            part.sequence: part.sequence.num_before + part.num_rows
            for part in parts
            if not part.sequence.is_cancelled
        }
        most = min((part.num_rows for part in parts if not part.sequence.leader), default=0) / TINY
        return [
            item
            for item in self._scheduler.followers
            if item not in stops
            and item.leader in stops
            and item.follows_to <= stops[item.leader]
            and item.can_follow
            and item.num_tokens - item.follows_to < most
        ]


def _whole_prompts(ranked: list[Sequence], num_rows: int, most_each: int) -> list[PassPart]:
    """Prompts of at most `most_each` rows, in order, as long as all of one fits."""
    parts: list[PassPart] = []
    for sequence in ranked:
        if sequence.num_unread <= min(num_rows - _rows(parts), most_each):
            parts.append(PassPart(sequence, sequence.num_unread))
    return parts


def _rows(parts: list[PassPart]) -> int:
    return sum(part.num_rows for part in parts)
