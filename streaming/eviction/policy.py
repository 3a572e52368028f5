"""Which resident expert of a layer goes when another needs its slot.

One policy object for each layer, owned by the store and called on its thread. Every policy is
deterministic. One list over all layers would never hit: a token touches every layer before it returns to
the first.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]  # [tokens, experts]


class Policy:
    """What is known of one layer's experts, resident or not."""

    @property
    def watches_scores(self) -> bool:
        """Whether `observe` has to be called."""
        return False

    def observe(self, scores: Scores) -> None:
        """Notes by what the router chose among this layer's experts, a row for each token."""

    def ask(self, experts: Sequence[int], resident: Collection[int], num_slots: int) -> None:
        """Notes what one decode step asks for, ascending, before any of it is read or used.

        `resident`: the experts that hold slots now, of `num_slots`.
        """

    def use(self, experts: Sequence[int]) -> None:
        """Notes that one request used these experts, ascending."""

    def worth(self, expert: int) -> float:
        """Returns what keeping the expert is worth: of two, the one with less gives up its place."""
        raise NotImplementedError


class LeastRecentlyUsed(Policy):
    """The expert unused for longest goes; of one request's experts the lowest id is the oldest."""

    def __init__(self) -> None:
        self._last_use: dict[int, int] = {}
        self._num_uses = 0

    def use(self, experts: Sequence[int]) -> None:
        for expert in experts:
            self._num_uses += 1
            self._last_use[expert] = self._num_uses

    def worth(self, expert: int) -> float:
        return self._last_use.get(expert, 0)


# Picked on eight routings together, recorded and synthetic, where neighbouring values are within 0.2 points
# of these in the mean; what is picked on one of them holds on the others (`benchmarks.policies --hold-out`).
# A fifth of the mean is the newest token's: half of it is three tokens old or older.
NEARNESS_KEEP = 0.8
# How far from being chosen, in standard deviations of the token's scores, halves what an expert gets for it.
NEARNESS_SCALE = 0.7
# Of the means by which nearness is judged, half is 70 tokens old or older.
JUDGED_KEEP = 0.99
# What an expert is taken to have been chosen, and as often near, before anything is known of it: a share of
# what experts are chosen on average.
JUDGED_PRIOR = 0.3


# Of many rows the last count. With three quarters of each recorded routing as a prompt, what follows hits
# between 0.08 points less and 0.02 more than by all rows; 32,768 rows take a fiftieth of the time.
OBSERVED_ROWS = 512


class LeastNearlyChosen(Policy):
    """The expert goes that lately came least near to being chosen, by what its coming near has been worth.

    The router scores all experts, so an expert that just missed is known to be likelier than one that was
    far off; a policy that sees only choices cannot tell them apart. But some come near all the time and are
    hardly ever chosen: what an expert gets for being near is multiplied by how often it was chosen for how
    often it was near. Without that, a trained model of 256 experts hits 4 points less than with LRU, with it
    2 to 3 more (benchmarks/notes.md).
    """

    watches_scores = True

    def __init__(
        self, num_experts: int, k: int, *, keep: float = NEARNESS_KEEP, scale: float = NEARNESS_SCALE
    ) -> None:
        self._k, self._keep, self._scale = k, keep, scale
        self._prior = JUDGED_PRIOR * k / num_experts
        self._nearness, self._often_near, self._often_chosen = np.zeros((3, num_experts))
        self._worth = np.zeros(num_experts)

    def observe(self, scores: Scores) -> None:
        scores = scores[-OBSERVED_ROWS:]
        threshold = np.partition(scores, -self._k, axis=-1)[:, -self._k, None]
        distance = scores - threshold
        # The logistic function; as a tanh it cannot overflow.
        steepness = 0.5 / (self._scale * _spread(scores, threshold) + 1e-9)
        near = _mean(0.5 + 0.5 * np.tanh(distance * steepness))
        if np.isnan(near).any():  # the request that it is of ends; a mean would never be a number again
            return
        new, long_new = 1 - self._keep ** len(scores), 1 - JUDGED_KEEP ** len(scores)
        self._nearness += new * (near - self._nearness)
        self._often_near += long_new * (near - self._often_near)
        self._often_chosen += long_new * (_mean(distance >= 0) - self._often_chosen)
        self._worth = self._nearness * (self._often_chosen + self._prior) / (self._often_near + self._prior)

    def worth(self, expert: int) -> float:
        return float(self._worth[expert])


def _mean(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    mean: npt.NDArray[Any] = rows[0] if len(rows) == 1 else np.add.reduce(rows, axis=0) / len(rows)
    return mean


def _spread(scores: Scores, threshold: Scores) -> Scores:
    """Standard deviation of each row; an expert ruled out with its group counts as being on the threshold.

    Spelt out in ufuncs: `std` costs 20 microseconds a call, and there is one call a layer and token.
    """
    if np.isneginf(scores).any():
        scores = np.where(np.isneginf(scores), threshold, scores)
    centred = scores - np.add.reduce(scores, axis=-1, keepdims=True) / scores.shape[-1]
    variance: Scores = np.add.reduce(centred * centred, axis=-1, keepdims=True) / scores.shape[-1]
    return np.sqrt(variance)
