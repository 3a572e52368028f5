"""Permission to write into a slot, and how it is taken back.

Owns each slot's generation. A reader's thread writes only between `enter` and `leave`, and `enter` says no
once the slot has been issued again or revoked: a read that comes late can never write into somebody else's
slot.
"""

import threading
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

Slot = tuple[Hashable, int]  # the bank, by its layer or another name of its own, and the slot's number


@dataclass(frozen=True)
class Ticket:
    """The right to fill one slot of one bank, until the slot's generation moves on."""

    bank: Hashable
    slot: int
    generation: int


class TicketOffice:
    """All slots' generations. Any thread may call it; no call waits for longer than one copy in memory."""

    def __init__(self) -> None:
        self._generations: defaultdict[Slot, int] = defaultdict(int)
        self._writers: defaultdict[Slot, int] = defaultdict(int)
        self._changed = threading.Condition()

    def issue(self, bank: Hashable, slot: int) -> Ticket:
        """A new ticket; earlier tickets for this slot are void and their writers gone when it returns."""
        return Ticket(bank, slot, self.revoke(bank, slot))

    def revoke(self, bank: Hashable, slot: int) -> int:
        """Voids the slot's ticket and waits until nobody writes under it; returns the new generation."""
        with self._changed:
            self._generations[bank, slot] += 1
            self._changed.wait_for(lambda: self._writers[bank, slot] == 0)
            return self._generations[bank, slot]

    def enter(self, ticket: Ticket) -> bool:
        """Whether the ticket still holds; if so, the caller may write until it calls `leave`."""
        with self._changed:
            if self._generations[ticket.bank, ticket.slot] != ticket.generation:
                return False
            self._writers[ticket.bank, ticket.slot] += 1
            return True

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._writers[ticket.bank, ticket.slot] -= 1
            self._changed.notify_all()

    def num_writers(self) -> int:
        """Writers inside any slot; 0 whenever no read is outstanding."""
        with self._changed:
            return sum(self._writers.values())
