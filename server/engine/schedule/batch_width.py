"""How many answers go forward in one step, where experts are streamed. Owned by the engine's loop.

A wider step saves synchronisations and arithmetic but hardly any bytes, and the conversations in it dilute
one cache of experts, which may hold two of them and not three: which width gives the most tokens per second
is measured. A survey runs the powers of two by turns, the one in use among them, in three rounds, and the
best median is taken: what slows the machine for a while slows all of them, and one disturbed measurement
decides nothing. Between surveys passes a multiple of the time that the last one took.

While prompts keep coming all go forward together. Who takes turns ends at another time, and so do those who
were left behind by a survey; then each one's next prompt has a sweep of its own, which costs as much as fifty
to seventy tokens. No width is worth that.
"""

from collections import defaultdict
from statistics import median

# Steps of each width in a round. The first are a turn in which the cache comes to hold what this width wants,
# the others a whole turn, with what it costs to begin one.
SETTLING_STEPS, COUNTED_STEPS = 8, 8
ROUNDS = 3
# What is so much slower than the best of a round is not tried again in this survey.
HOPELESS = 0.75
# A width must be better by this part to be taken instead.
MARGIN = 0.02
# So many steps without a prompt before there is a survey: as many as a short answer has.
QUIET_STEPS = 128
# Steps before the first survey, and pauses after it in times of its length: at first, and at most.
FIRST_STEPS = 16
FIRST_PAUSE, LONGEST_PAUSE = 4, 24


class Width:
    """`choose` before each step, `note` after it, `note_prompt` after a prompt; `fixed` leaves no choice."""

    def __init__(self, most: int, fixed: int | None, *, adapts: bool) -> None:
        self._most = fixed or most
        self._chooses = adapts and not fixed
        self.rates: dict[int, float] = {}  # tokens/s by width, in the last survey
        self.chosen = self._most
        self._widths: list[int] = []  # of the survey under way; the first is being measured
        self._seen: dict[int, list[float]] = {}  # tokens/s by width, one a round
        self._survey_s = self._pause_s = 0.0
        self._pause = FIRST_PAUSE
        self._num_steps = self._num_rows = 0
        self._quiet_steps = QUIET_STEPS
        self._counted_s = 0.0

    def choose(self, num_decoding: int) -> int:
        """Rows of the next step, where so many sequences decode."""
        if not self._chooses:
            return self._most
        most = min(num_decoding, self._most)
        if self._widths and 0 < most <= self._widths[0] // 2:  # so few say nothing about this width
            self._end_survey()
        is_due = self._num_steps >= FIRST_STEPS and self._pause_s <= 0 and self._quiet_steps >= QUIET_STEPS
        if not self._widths and most > 1 and is_due:
            self._begin_survey(most)
        width = self._widths[0] if self._widths else self.chosen
        return min(width, most) if most else width

    def note(self, width: int, seconds: float) -> None:
        """An undisturbed step of so many rows took so long."""
        if not self._chooses:
            return
        self._quiet_steps += 1
        if not self._widths:
            self._num_steps += 1
            self._pause_s -= seconds
            return
        self._survey_s += seconds
        self._num_steps += 1
        if self._num_steps > SETTLING_STEPS:
            self._num_rows += width
            self._counted_s += seconds
        if self._num_steps == SETTLING_STEPS + COUNTED_STEPS:
            self._end_turn()

    def note_prompt(self) -> None:
        """A prompt was read, or some that shared a sweep."""
        if not self._chooses:
            return
        if self._widths:
            self._end_survey()
        if self._quiet_steps < QUIET_STEPS:
            self.chosen = self._most
        self._quiet_steps = 0

    def _begin_survey(self, most: int) -> None:
        """Widths from the narrowest to all that decode, which count as the next power of two."""
        self._widths = [2**i for i in range(self._most.bit_length() + 1) if 2**i < 2 * most]
        self._seen, self._survey_s = defaultdict(list), 0.0
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._num_steps = self._num_rows = 0
        self._counted_s = 0.0

    def _end_turn(self) -> None:
        width = self._widths.pop(0)
        self._seen[width].append(self._num_rows / max(self._counted_s, 1e-9))
        self._begin_turn()
        if not self._widths:
            self._end_round()

    def _end_round(self) -> None:
        rates = {width: median(seen) for width, seen in self._seen.items()}
        num_rounds = max(map(len, self._seen.values()))
        going_on = [width for width, rate in rates.items() if rate >= HOPELESS * max(rates.values())]
        if num_rounds < ROUNDS and len(going_on) > 1:
            self._widths = going_on
            return
        self._take(rates)

    def _take(self, rates: dict[int, float]) -> None:
        """The best, unless the one in use is nearly as good."""
        self.rates = rates
        best, current = max(rates, key=rates.__getitem__), min(self.chosen, max(rates))
        if rates[best] > (1 + MARGIN) * rates[current]:
            self.chosen, self._pause = best, FIRST_PAUSE
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._end_survey()

    def _end_survey(self) -> None:
        self._widths, self._num_steps = [], FIRST_STEPS
        self._pause_s = self._pause * self._survey_s
