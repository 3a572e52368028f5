"""Permission to write into a slot, and how it is taken back.

Owns each slot's generation. A reader's thread writes only between `enter` and `leave`, and `enter` says no
once the slot has been issued again or revoked: a read that comes late can never write into somebody else's
slot.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ticket:
    """The right to fill one slot of one layer, until the slot's generation moves on."""

    layer: int
    slot: int
    generation: int


class TicketOffice:
    """All layers' generations. Any thread may call it; no call waits for longer than one copy in memory."""

    def __init__(self, num_slots: Mapping[int, int]) -> None:
        self._generations = {layer: [0] * count for layer, count in num_slots.items()}
        self._writers = {layer: [0] * count for layer, count in num_slots.items()}
        self._changed = threading.Condition()

    def issue(self, layer: int, slot: int) -> Ticket:
        """A new ticket; earlier tickets for this slot are void and their writers gone when it returns."""
        return Ticket(layer, slot, self.revoke(layer, slot))

    def revoke(self, layer: int, slot: int) -> int:
        """Voids the slot's ticket and waits until nobody writes under it; returns the new generation."""
        with self._changed:
            self._generations[layer][slot] += 1
            self._changed.wait_for(lambda: self._writers[layer][slot] == 0)
            return self._generations[layer][slot]

    def enter(self, ticket: Ticket) -> bool:
        """Whether the ticket still holds; if so, the caller may write until it calls `leave`."""
        with self._changed:
            if self._generations[ticket.layer][ticket.slot] != ticket.generation:
                return False
            self._writers[ticket.layer][ticket.slot] += 1
            return True

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._writers[ticket.layer][ticket.slot] -= 1
            self._changed.notify_all()

    def num_writers(self) -> int:
        """Writers inside any slot; 0 whenever no read is outstanding."""
        with self._changed:
            return sum(map(sum, self._writers.values()))
