"""Which policy decides what experts give up their places: `--expert-policy auto`.

LRU decides first. In a trial each layer keeps the ids that its bank would hold under either policy, without
bytes, and counts what decode steps would have hit. Both books see the same steps, so sweeps and guesses,
which change the real banks, favour neither. After a trial the other policy decides if it hit more by
`MARGIN`. Trials are rare, because nearness costs time where it does not decide. Called on the store's thread.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

from config.defaults import ExpertPolicy
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed, Policy, Scores

# Steps of a trial: the first are not counted, because nearness has to learn and the books have to part.
WARM_STEPS, COUNTED_STEPS = 64, 128
# What the other policy has to hit more, as a share of the experts asked for.
MARGIN = 0.0025
# A trial costs some 80 to 120 microseconds a layer and step (`benchmarks.policies --cost`); with such pauses
# less than 3 in the mean.
PAUSE_STEPS = 10_000
# Trials without a pause, after the start and after each switch.
FIRST_TRIALS = 2

log = logging.getLogger(__name__)


class Rule(Protocol):
    """Makes a policy for each layer of a store. Not to be used for a second store.

    `name`: as `--expert-policy` has it. `decides`: the policy that is followed now. `gain`: what nearness hit
    more than LRU when both were tried last, as a share of the experts asked for; None where they were not.
    """

    name: ExpertPolicy
    decides: ExpertPolicy
    gain: float | None

    def __call__(self) -> Policy:
        """Makes the policy of one more layer."""
        ...


def make_rule(name: ExpertPolicy, num_experts: int, k: int) -> Rule:
    """Makes the rule for a model with `num_experts` experts a layer, of which a token takes `k`."""
    if name == "auto":
        return Contest(num_experts, k)
    return Fixed(name, LeastRecentlyUsed if name == "lru" else partial(LeastNearlyChosen, num_experts, k))


class Fixed:
    """One policy for good."""

    gain: float | None = None

    def __init__(self, name: ExpertPolicy, make: Callable[[], Policy]) -> None:
        self.name = self.decides = name
        self._make = make

    def __call__(self) -> Policy:
        """Makes the policy of one more layer."""
        return self._make()


class Contest:
    """LRU or nearness in all layers, whichever hits more; keeps the score of all of them."""

    name: ExpertPolicy = "auto"

    def __init__(self, num_experts: int, k: int) -> None:
        self.decides: ExpertPolicy = "lru"
        self.gain: float | None = None
        self.trial: int | None = 0  # the number of the one that goes on
        self._make_nearness = partial(LeastNearlyChosen, num_experts, k)
        self._has_layers = False
        self._num_trials = self._num_agreed = 0  # trials so far; those since the last switch
        self._step = 0
        self._num_asked = self._num_more = 0.0

    def __call__(self) -> Policy:
        """Makes the policy of one more layer; the first one counts the steps."""
        is_first, self._has_layers = not self._has_layers, True
        return _Contestant(self, self._make_nearness(), is_first)

    def begin_step(self) -> None:
        """Counts one decode step, and begins or ends a trial with it."""
        self._step += 1
        if self.trial is None and self._step > PAUSE_STEPS:
            self._begin()
        elif self.trial is not None and self._step > WARM_STEPS + COUNTED_STEPS:
            self._judge()

    def count(self, num_asked: int, num_more: int) -> None:
        """Notes that nearness would have hit `num_more` of a step's experts more than LRU."""
        if self._step > WARM_STEPS:
            self._num_asked += num_asked
            self._num_more += num_more

    def _begin(self) -> None:
        self._num_trials += 1
        self.trial, self._step = self._num_trials, 0
        self._num_asked, self._num_more = self._num_asked / 2, self._num_more / 2  # older trials count less

    def _judge(self) -> None:
        self.gain = self._num_more / max(1, self._num_asked)
        self._num_agreed += 1
        if (self.gain if self.decides == "lru" else -self.gain) >= MARGIN:
            self.decides = "nearness" if self.decides == "lru" else "lru"
            self._num_agreed = 0
            log.info(
                "--expert-policy auto: %s decides now; nearness would have hit %+.2f points against lru in "
                "%d steps",
                self.decides, 100 * self.gain, COUNTED_STEPS,
            )  # fmt: skip
        self.trial, self._step = None, 0
        if self._num_agreed < FIRST_TRIALS:
            self._begin()


class _Contestant(Policy):
    """The policy of one layer: knows by both rules, and follows the one that decides."""

    def __init__(self, contest: Contest, nearness: Policy, is_first: bool) -> None:
        self._contest, self._is_first = contest, is_first
        self._lru, self._nearness = LeastRecentlyUsed(), nearness
        self._trial: int | None = None
        self._books: tuple[_Books, _Books] | None = None

    @property
    def watches_scores(self) -> bool:
        return self._contest.trial is not None or self._contest.decides == "nearness"

    def observe(self, scores: Scores) -> None:
        self._nearness.observe(scores)

    def ask(self, experts: Sequence[int], resident: Collection[int], num_slots: int) -> None:
        if self._is_first:
            self._contest.begin_step()
        trial = self._contest.trial
        if trial != self._trial:
            self._trial = trial
            self._books = None if trial is None else (_Books(resident), _Books(resident))
        if self._books is not None and len(experts) <= num_slots:
            by_lru = self._books[0].ask(experts, num_slots, self._lru)
            by_nearness = self._books[1].ask(experts, num_slots, self._nearness)
            self._contest.count(len(experts), by_nearness - by_lru)

    def use(self, experts: Sequence[int]) -> None:
        if self._books is not None or self._contest.decides == "lru":  # a trial is long enough to learn again
            self._lru.use(experts)

    def worth(self, expert: int) -> float:
        decides = self._lru if self._contest.decides == "lru" else self._nearness
        return decides.worth(expert)


class _Books:
    """The ids that a bank would hold if one policy decided."""

    def __init__(self, resident: Collection[int]) -> None:
        self._held = set(resident)

    def ask(self, experts: Sequence[int], num_slots: int, policy: Policy) -> int:
        """Brings what a step asks for into the books. Returns how many were there."""
        missed = [expert for expert in experts if expert not in self._held]
        num_over = len(self._held) + len(missed) - num_slots
        if num_over > 0:
            self._held.difference_update(sorted(self._held.difference(experts), key=policy.worth)[:num_over])
        self._held.update(missed)
        return len(experts) - len(missed)
