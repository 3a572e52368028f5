"""Which resident expert of a layer goes when another needs its slot.

One policy object for each layer, owned by the store and called on its thread. Every policy is
deterministic. One list over all layers would never hit: a token touches every layer before it returns to
the first.
"""

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Protocol


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
