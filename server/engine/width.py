"""How many answers go forward in one step, where experts are streamed. Owned by the engine's loop.

A wider step saves synchronisations and arithmetic but hardly any bytes, and the conversations in it dilute
one cache of experts, which may hold two of them and not three: which width gives the most tokens per second
is measured. The powers of two are tried in turn, for a few steps each, more and more seldom while nothing
better is found.
"""

# Steps of a trial, the first of which are not counted: the cache still holds what the last width wanted.
TRIAL_STEPS, SETTLING_STEPS = 24, 8
# Steps between trials: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
# A width must be better by this part to be taken instead.
MARGIN = 0.03
FRESHNESS = 1 / 16


class Width:
    """`choose` before each step, `note` after it. `fixed`: no choice is made."""

    def __init__(self, most: int, fixed: int | None, *, adapts: bool) -> None:
        self._most, self._fixed, self._adapts = most, fixed, adapts
        self.rates: dict[int, float] = {}  # tokens/s by width
        self.chosen = fixed or most
        self._trial: int | None = None
        self._trial_steps = 0
        self._trial_s = 0.0
        self._last_tried = most
        self._pause = self._steps_left = FIRST_PAUSE

    def choose(self, num_decoding: int) -> int:
        """Rows of the next step, where so many sequences decode."""
        if self._fixed or not self._adapts:
            return self._fixed or self._most
        most = min(num_decoding, self._most)
        if self._trial is None and self._steps_left <= 0 and most > 1:
            self._begin_trial(most)
        return min(self._trial or self.chosen, most) if most else self.chosen

    def note(self, width: int, seconds: float) -> None:
        """An undisturbed step of so many rows took so long."""
        if self._fixed or not self._adapts:
            return
        if width == self._trial:
            self._trial_steps += 1
            if self._trial_steps > SETTLING_STEPS:
                self._trial_s += seconds
            if self._trial_steps == TRIAL_STEPS:
                self._end_trial()
            return
        self._steps_left -= 1
        if seconds > 0:
            rate = width / seconds
            self.rates[width] = self.rates.get(width, rate) + FRESHNESS * (rate - self.rates.get(width, rate))

    def _begin_trial(self, most: int) -> None:
        """The next of the widths that are not in use, the widest after the narrowest."""
        current = min(self.chosen, most)
        widths = [width for width in (1, 2, 4, 8, 16) if width < most] + [most]
        others = [width for width in reversed(widths) if width != current]
        narrower = [width for width in others if width < self._last_tried]
        self._trial = self._last_tried = (narrower or others)[0]
        self._trial_steps, self._trial_s = 0, 0.0
        if not narrower:  # all have been tried
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _end_trial(self) -> None:
        width = self._trial
        assert width, "a trial ends once"
        self.rates[width] = width * (TRIAL_STEPS - SETTLING_STEPS) / max(self._trial_s, 1e-9)
        is_better = self.rates[width] > (1 + MARGIN) * self.rates.get(self.chosen, 0.0)
        if is_better:
            self.chosen = width
            self._pause = FIRST_PAUSE
        self._trial, self._steps_left = None, self._pause
