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
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)

    def issue(self, bank: Hashable, slot: int) -> Ticket:
        """A new ticket; earlier tickets for this slot are void and their writers gone when it returns."""
        return Ticket(bank, slot, self.revoke(bank, slot))

    def revoke(self, bank: Hashable, slot: int) -> int:
        """Voids the slot's ticket and waits until nobody writes under it; returns the new generation."""
        with self._lock:
            self._generations[bank, slot] += 1
            self._left.wait_for(lambda: self._writers[bank, slot] == 0)
            return self._generations[bank, slot]

    def enter(self, ticket: Ticket) -> bool:
        """Whether the ticket still holds; if so, the caller may write until it calls `leave`."""
        slot = ticket.bank, ticket.slot
        with self._lock:
            if self._generations[slot] != ticket.generation:
                return False
            self._writers[slot] += 1
            return True

    def leave(self, ticket: Ticket) -> None:
        slot = ticket.bank, ticket.slot
        with self._lock:
            self._writers[slot] -= 1
            if self._generations[slot] != ticket.generation:
                self._left.notify_all()  # somebody has voided it meanwhile and waits

    def num_writers(self) -> int:
        """Writers inside any slot; 0 whenever no read is outstanding."""
        with self._lock:
            return sum(self._writers.values())
