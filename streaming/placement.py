"""Which machine of a cluster owns which experts: it alone caches and reads them. Pure."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Deal:
    """The (row, expert) pairs of a step, numbered row by row, dealt to the ranks that own their experts.

    `mine`: numbers of this rank's pairs, ascending. `most`: pairs of the rank that has most of them.
    `places`: where each pair lies when the ranks' pairs, `most` places for each, lie one behind the other.
    """

    mine: Numbers
    most: int
    places: Numbers


@dataclass(frozen=True)
class Placement:
    """`owners`: the rank that owns each expert, in all layers alike. `rank`: this machine's."""

    rank: int
    num_ranks: int
    owners: tuple[int, ...]

    @classmethod
    def by_id(cls, rank: int, num_ranks: int, num_experts: int) -> "Placement":
        """Deals the experts to the ranks by turns."""
        return cls(rank, num_ranks, tuple(expert % num_ranks for expert in range(num_experts)))

    @cached_property
    def owned(self) -> tuple[int, ...]:
        """The experts of this rank, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners) if owner == self.rank)

    @cached_property
    def _owners(self) -> Numbers:
        return np.array(self.owners)

    def owns(self, expert: int) -> bool:
        """Whether the expert is this rank's."""
        return self.owners[expert] == self.rank

    def deal(self, wanted: NDArray[np.int32]) -> Deal:
        """Deals out the pairs of a step; `wanted` [N, k] are each row's experts."""
        owners = self._owners[wanted.ravel()]
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=self.num_ranks)
        firsts = np.cumsum(counts) - counts
        places = np.empty(len(owners), np.int64)
        places[order] = np.arange(len(owners)) - firsts[owners[order]]
        most = int(counts.max())
        return Deal(np.flatnonzero(owners == self.rank), most, owners * most + places)
