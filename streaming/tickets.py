"""Permission to write into a slot, and how it is taken back.

Owns each slot's generation. A reader's thread writes only between `enter` and `leave`, and `enter` says no
once the slot has been issued again or revoked. A thread that reads straight into a slot is inside for as long
as its read takes, and one whose read hangs stays there: such a slot is nobody's until `is_written` says no.
So a read that comes late can never write into somebody else's slot.
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
    """All slots' generations. Any thread may call it; no call waits."""

    def __init__(self) -> None:
        self._generations: defaultdict[Slot, int] = defaultdict(int)
        self._writers: defaultdict[Slot, int] = defaultdict(int)
        self._renewed: dict[Slot, int] = {}  # the generation since which a slot is other memory
        self._lock = threading.Lock()

    def issue(self, bank: Hashable, slot: int) -> Ticket:
        """A new ticket, for a slot that nobody writes into; earlier ones are void."""
        assert not self.is_written(bank, slot), "a slot was issued that a late read may write into"
        return Ticket(bank, slot, self.revoke(bank, slot))

    def revoke(self, bank: Hashable, slot: int) -> int:
        """Voids the slot's ticket; returns the new generation."""
        with self._lock:
            self._generations[bank, slot] += 1
            return self._generations[bank, slot]

    def renew(self, bank: Hashable) -> None:
        """The bank's slots are other memory now: whoever is still inside writes into none of them."""
        with self._lock:
            for slot, count in self._writers.items():
                if slot[0] == bank and count:
                    self._generations[slot] += 1
                    self._renewed[slot] = self._generations[slot]
                    self._writers[slot] = 0

    def is_written(self, bank: Hashable, slot: int) -> bool:
        """Whether anybody is inside, under whichever ticket."""
        return self._writers.get((bank, slot), 0) > 0

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
            if ticket.generation >= self._renewed.get(slot, 0):
                self._writers[slot] -= 1

    def num_writers(self) -> int:
        """Writers inside any slot; 0 whenever no read is outstanding."""
        with self._lock:
            return sum(self._writers.values())
