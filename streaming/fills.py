"""Experts on their way from disk into a slot, and the tickets under which they come.

`Filler` owns the reader and the tickets and is called on the store's thread; the reader's threads deliver
bytes, under a ticket. It keeps no books: which slots are free is the caller's business.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from config.errors import DiskError
from streaming.banks import Bank
from streaming.disk.disk import Disk
from streaming.disk.mirror import MirroredDisk
from streaming.disk.reader import Reader
from streaming.disk.reads import Batch, Read, ReadClass, ReadDropped, ReadStatistics
from streaming.files.floats import Bytes
from streaming.files.index import ExpertIndex
from streaming.files.read_plan import Run, Segment, largest_run_bytes, plan_runs, plan_shared_runs

Slot = tuple[Hashable, int]  # the bank, by its layer or another name of its own, and the slot's number


@dataclass(frozen=True)
class Ticket:
    """The right to fill one slot of one bank, until the slot's generation moves on."""

    bank: Hashable
    slot: int
    generation: int


class TicketOffice:
    """All slots' generations. Any thread may call it; no call waits.

    A reader's thread writes only between `enter` and `leave`, and `enter` refuses a ticket that is no longer
    valid. A thread whose read hangs stays inside, and its slot goes to no other expert while `is_written`.
    """

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
        """Ends the validity of the slot's ticket; returns the new generation."""
        with self._lock:
            self._generations[bank, slot] += 1
            return self._generations[bank, slot]

    def renew(self, bank: Hashable) -> None:
        """Records that the bank's slots are new memory; threads still inside write into the old one."""
        with self._lock:
            for slot, count in self._writers.items():
                if slot[0] == bank and count:
                    self._generations[slot] += 1
                    self._renewed[slot] = self._generations[slot]
                    self._writers[slot] = 0

    def is_written(self, bank: Hashable, slot: int) -> bool:
        """Whether a reader's thread may still write into the slot, under any ticket."""
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


@dataclass(eq=False)
class Fill:
    """An expert on its way into a slot; `batch` is set once its reads are submitted."""

    expert: int
    ticket: Ticket
    reads: Sequence[Read]
    batch: Batch | None = None

    @property
    def slot(self) -> int:
        return self.ticket.slot

    @property
    def is_settled(self) -> bool:
        return self.batch is not None and self.batch.num_pending == 0

    @property
    def error(self) -> Exception | None:
        """Why the expert did not arrive; a read dropped after another's failure says less than that one."""
        errors = [read.error for read in self.reads if read.error is not None]
        return min(errors, key=lambda error: isinstance(error, ReadDropped), default=None)


@dataclass(frozen=True)
class Fetch:
    """Experts asked for together: where each will lie, and which of them are there already.

    `fills` are still on their way; their slots may be named in products once `finish` has returned.
    """

    layer: int
    slots: npt.NDArray[np.int32]
    is_here: npt.NDArray[np.bool_]
    fills: Sequence[Fill] = ()


def raise_failure(layer: int, failed: Sequence[Fill]) -> None:
    """Raises the error of fills that did not arrive: of the first that says why."""
    for fill in sorted(failed, key=lambda fill: isinstance(fill.error, ReadDropped)):
        if not isinstance(fill.error, DiskError):
            raise fill.error or AssertionError("a failed fill without its error")
        raise DiskError(f"layer {layer}, expert {fill.expert}: {fill.error}") from fill.error


class Filler:
    """Starts fills, hastens them, waits for them, and voids them."""

    def __init__(
        self,
        index: ExpertIndex,
        disk: Disk,
        *,
        num_threads: int,
        timeout_s: float,
    ) -> None:
        self._index = index
        self.reads_straight = True  # into slots, where a bank offers its memory
        self._tickets = TicketOffice()
        self._plan = plan_shared_runs if isinstance(disk, MirroredDisk) else plan_runs
        self._voided: defaultdict[Hashable, list[Fill]] = defaultdict(list)  # by bank, oldest first
        self._reader = Reader(
            disk,
            index.stamps,
            max_read_bytes=largest_run_bytes(index),
            num_threads=num_threads,
            timeout_s=timeout_s,
        )

    @property
    def statistics(self) -> ReadStatistics:
        return self._reader.statistics

    @property
    def memory_bytes(self) -> int:
        """Memory of the reader's buffers."""
        return self._reader.memory_bytes

    def make(
        self,
        layer: int,
        bank: Bank,
        expert: int,
        slot: int,
        read_class: ReadClass,
        *,
        owner: Hashable | None = None,
    ) -> Fill:
        """Makes a fill with its reads, not yet submitted. No read may still be writing into the slot.

        `owner` names the bank where it is not the layer's own.
        """
        ticket = self._tickets.issue(layer if owner is None else owner, slot)
        runs = self._plan(self._index.pieces(layer, expert))
        return Fill(expert, ticket, [self._read(run, bank, ticket, read_class) for run in runs])

    def _read(self, run: Run, bank: Bank, ticket: Ticket, read_class: ReadClass) -> Read:
        targets, others = [], []
        for segment in run.segments:
            target = None
            if self.reads_straight:
                target = bank.target(ticket.slot, segment.part, segment.start, segment.nbytes, segment.at)
            if target is None:
                others.append(segment)
            else:
                targets.append(target)
        return Read(
            run.path,
            run.offset,
            run.nbytes,
            partial(_write, bank, ticket.slot, others),
            read_class,
            targets,
            partial(self._tickets.enter, ticket),
            partial(self._tickets.leave, ticket),
        )

    def submit(self, fills: Sequence[Fill]) -> None:
        """Starts the reads of fills that are waited for together."""
        batch = self._reader.submit([read for fill in fills for read in fill.reads])
        for fill in fills:
            fill.batch = batch

    def hasten(self, fill: Fill) -> None:
        """Moves the reads of a fill into the class that a step waits for."""
        assert fill.batch is not None, "only a submitted fill can be hastened"
        self._reader.promote(fill.batch, ReadClass.DEMAND)

    def cancel(self, fill: Fill) -> bool:
        """Drops the reads that were not started.

        Returns True if there were any, so the expert cannot arrive.
        """
        assert fill.batch is not None, "only a submitted fill can be cancelled"
        return self._reader.cancel(fill.batch)

    def wait(self, fills: Sequence[Fill]) -> float:
        """Waits until all fills have settled. Returns the seconds that took."""
        start_s = time.monotonic()
        for batch in dict.fromkeys(fill.batch for fill in fills):
            assert batch is not None, "a fill is waited for once its reads are submitted"
            self._reader.wait(batch)
        return time.monotonic() - start_s

    def void(self, fill: Fill) -> None:
        """Voids a fill's ticket and drops its unstarted reads. Never waits: see `is_written`."""
        self._tickets.revoke(fill.ticket.bank, fill.slot)
        if not fill.is_settled:
            self.cancel(fill)
        voided = [one for one in self._voided[fill.ticket.bank] if not one.is_settled]
        self._voided[fill.ticket.bank] = voided if fill.is_settled else [*voided, fill]

    def wait_for_voided(self, owner: Hashable) -> bool:
        """Waits until the oldest voided fill of a bank has settled. Returns False if all have."""
        for fill in self._voided[owner]:
            if not fill.is_settled:
                self.wait([fill])
                return True
        return False

    def renew(self, owner: Hashable) -> None:
        """Records that a bank's slots are new memory. Reads that still run write into the old memory."""
        self._tickets.renew(owner)
        self._voided.pop(owner, None)

    def is_written(self, owner: Hashable, slot: int) -> bool:
        """Whether a voided read still runs and may write into the slot, which must not be taken then."""
        return self._tickets.is_written(owner, slot)

    @property
    def is_reading_voided(self) -> bool:
        """Whether reads of voided fills still run."""
        return any(not fill.is_settled for fills in self._voided.values() for fill in fills)

    def num_writers(self) -> int:
        return self._tickets.num_writers()

    def close(self) -> None:
        self._reader.close()


def _write(bank: Bank, slot: int, segments: Sequence[Segment], raw: Bytes) -> None:
    """Converts bytes of a run into the slot's own types. Runs on a reader's thread."""
    for segment in segments:
        bank.write(slot, segment.part, segment.start, raw[segment.at : segment.at + segment.nbytes])
