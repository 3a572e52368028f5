"""Divides time between decode steps and passes over prompts. Owned by the engine's loop.

Decode steps get at least their share of the wall time while both want it, and between two of them a pass
computes for at most so many undisturbed steps' time as leaves one step in every floor(1 / share): with a
share of 0.3 no gap between tokens is longer than three undisturbed steps and one layer of the pass.

A step among the layers of a pass is slower than one alone. What agents feel is their rate, so a step counts
as what it would have taken undisturbed, as long as that leaves the pass enough. Their share is theirs at any
moment, also when the pass ends: a step goes first where the next part of a layer would leave them less.
"""

from collections import defaultdict, deque
from statistics import median

# Steps of whose times the median is what a step takes. Now and then one waits much longer for the disk than
# most; a running mean that follows it would leave decode a twentieth less than its share.
NUM_STEPS = 9
# How much slower than undisturbed steps may be at the cost of the pass: 0.3 x 1.25 leaves it 1 / 1.6.
MOST_SLOWER = 1.25


class Pace:
    """Times are those that the loop measures; a step is undisturbed if it ran while no prompt was read."""

    def __init__(self, decode_share: float) -> None:
        self._share = decode_share
        every = int(1 / decode_share)
        self._max_gap_steps = every - 1
        self._undisturbed: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_STEPS))
        most_slower = min(MOST_SLOWER, (1 + decode_share) / (2 * decode_share))
        self._most_share = max(decode_share * most_slower, 1 / every if every > 1 else 0.0)
        self._decode_s = self._used_s = self._wall_s = self._since_step_s = 0.0
        self._part_s = 0.0  # the last part of a layer

    def note_step(self, seconds: float, width: int, *, is_disturbed: bool) -> None:
        """Records the time of a decode step of `width` rows."""
        self._since_step_s = 0.0
        if is_disturbed:
            if not self._undisturbed[width]:  # better than to know nothing
                self._undisturbed[width].append(seconds)
            self._decode_s += min(seconds, self._step_s(width) or seconds)
            self._used_s += seconds
            self._wall_s += seconds
        else:  # nobody owes the other anything, but a prompt that comes now need not wait for one more step
            self._decode_s = self._wall_s = seconds
            self._used_s = self._part_s = 0.0
            self._undisturbed[width].append(seconds)

    def note_layer(self, seconds: float) -> None:
        """Records the time of a layer of a pass, or of a part of one, while sequences waited to decode."""
        self._wall_s += seconds
        self._since_step_s += seconds
        self._part_s = seconds

    def is_step_due(self, width: int) -> bool:
        """Whether a decode step of `width` rows goes before the next layer."""
        if self._used_s > self._most_share * self._wall_s:
            return False
        step_s = self._step_s(width)
        if step_s is None:
            return True
        if self._decode_s < self._share * (self._wall_s + self._part_s + step_s):
            return True
        return self._since_step_s > 0 and self._since_step_s >= self._max_gap_steps * step_s

    def _step_s(self, width: int) -> float | None:
        """Seconds of an undisturbed step of `width` rows; None before there was one."""
        return median(self._undisturbed[width]) if self._undisturbed[width] else None
