"""Which resident expert of a layer goes when another needs its slot.

One policy object for each layer, owned by the store and called on its thread. Every policy is
deterministic. One list over all layers would never hit: a token touches every layer before it returns to
the first.
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Policy(Protocol):
    """Follows which experts are resident: in through `use`, out through `forget`."""

    def use(self, experts: Sequence[int]) -> None:
        """One request used these experts, ascending; those not yet resident become so."""
        ...

    def victim(self, keep: Container[int]) -> int:
        """The resident expert to give up, never one in `keep`."""
        ...

    def forget(self, expert: int) -> None:
        """This expert is no longer resident."""
        ...


class LeastRecentlyUsed:
    """The expert unused for longest goes; of one request's experts the lowest id is the oldest."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def use(self, experts: Sequence[int]) -> None:
        for expert in experts:
            self._order[expert] = None
            self._order.move_to_end(expert)

    def victim(self, keep: Container[int]) -> int:
        return next(expert for expert in self._order if expert not in keep)

    def forget(self, expert: int) -> None:
        del self._order[expert]


class DecayedPopularity:
    """Recency and popularity: each use counts one, and counts decay by `keep` with every request.

    With a `keep` of 0.5 and below it orders as LRU does; towards 1 it counts uses.
    """

    def __init__(self, keep: float = 0.9) -> None:
        self._keep = keep
        self._value: npt.NDArray[np.float64] = np.zeros(0)
        self._is_resident: npt.NDArray[np.bool_] = np.zeros(0, bool)

    def use(self, experts: Sequence[int]) -> None:
        self._grow(max(experts, default=-1) + 1)
        self._value *= self._keep
        self._value[list(experts)] += 1
        self._is_resident[list(experts)] = True

    def victim(self, keep: Container[int]) -> int:
        candidates = [int(e) for e in np.flatnonzero(self._is_resident) if e not in keep]
        return min(candidates, key=self._value.__getitem__)

    def forget(self, expert: int) -> None:
        self._is_resident[expert] = False

    def _grow(self, num_experts: int) -> None:
        if (missing := num_experts - len(self._value)) > 0:
            self._value = np.concatenate([self._value, np.zeros(missing)])
            self._is_resident = np.concatenate([self._is_resident, np.zeros(missing, bool)])
