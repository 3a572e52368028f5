"""One layer of a sweep: every expert that a prompt wants, in ascending id, each read at most once.

Owns the ring and what sweeps count; called by the store on its thread. Resident experts are used where they
lie. The others pass through the ring: while some are computed with, the next are read, on into the next
layer where that is sure to want them. The hottest stay in the layer's bank. A sweep does not count as use:
it wants nearly every expert, so it says nothing about which one decode wants next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from streaming.files.index import ExpertIndex
from streaming.fills import raise_failure
from streaming.layer import StoreLayer
from streaming.residency import Residency
from streaming.ring import Ring
from streaming.statistics import StoreStatistics

# A layer that wanted this share of its experts is followed by one that wants nearly all of its own.
WHOLE_SHARE = 0.95
# Of a bank's slots, those that one sweep may give to other experts; free ones come on top.
ADMITTED_SHARE = 0.25


@dataclass(frozen=True)
class Place:
    """Where an expert lies until the next group is asked for: a slot of these arrays."""

    expert: int
    arrays: Mapping[str, mx.array]
    slot: int


class Sweeper:
    """Brings the experts of one layer after the other, group by group."""

    def __init__(self, index: ExpertIndex, ring: Ring, counts: StoreStatistics) -> None:
        self._index, self._ring, self._counts = index, ring, counts

    def sweep(
        self, here: StoreLayer, following: StoreLayer | None, rows_of: Mapping[int, int], at_once: int
    ) -> Iterator[Sequence[Place]]:
        """Groups of at most `at_once` places, in ascending expert id.

        `rows_of`: how many rows want each expert. Asking for the next group says that all products with
        the last one are evaluated. Before that the banks may serve others, but no other sweep may begin.
        DiskError names what could not be read.
        """
        experts = sorted(rows_of)
        missing = [expert for expert in experts if expert not in here.books]
        self._ring.begin(self._order(here.number, missing, following, len(experts)))
        hottest = _hottest(here.books, rows_of, missing)
        at_once = self.group_size(at_once)
        try:
            for first in range(0, len(experts), at_once):
                group = experts[first : first + at_once]
                left = [expert for expert in experts[first:] if expert not in here.books]
                if left != missing:  # decode steps ran meanwhile, and changed what is there
                    self._ring.begin(self._order(here.number, left, following, len(experts)))
                read = [expert for expert in group if expert in left]
                missing = left[len(read) :]
                yield self._bring(here, group, read)
                for expert in hottest.intersection(read):
                    self._admit(here, rows_of, expert)
                self._ring.release(here.number, read)
        except BaseException:  # the computation ended early, or a read failed: the rest is not asked for
            self._ring.clear()
            raise

    def group_size(self, at_once: int) -> int:
        """Experts in a group, where `at_once` are asked for: while they are computed the others are read."""
        return min(at_once, max(1, self._ring.num_slots // 2))

    def anticipate(self, here: StoreLayer) -> None:
        """Reads ahead for a sweep that will want all experts; not while the ring serves another."""
        if self._ring.is_idle:
            experts = self._index.experts
            self._ring.begin([(here.number, expert) for expert in experts if expert not in here.books])

    def _order(
        self, layer: int, missing: Sequence[int], following: StoreLayer | None, num_wanted: int
    ) -> list[tuple[int, int]]:
        """The reads of a sweep.

        This layer's missing experts, then the next layer's if it is sure to want all.
        """
        order = [(layer, expert) for expert in missing]
        if following is not None and num_wanted >= WHOLE_SHARE * len(self._index.experts):
            order += [(following.number, e) for e in self._index.experts if e not in following.books]
        return order

    def _bring(self, here: StoreLayer, group: Sequence[int], read: Sequence[int]) -> list[Place]:
        fills, waited_s = self._ring.bring(here.number, read) if read else ([], 0.0)
        self._counts.stall_s += waited_s
        if failed := [fill for fill in fills if fill.error is not None]:
            self._counts.failures += len(failed)
            raise_failure(here.number, failed)
        self._counts.sweep_hits += len(group) - len(read)
        self._counts.sweep_reads += len(read)
        self._counts.payload_bytes += len(read) * self._index.expert_bytes(here.number)
        in_ring = {fill.expert: fill.slot for fill in fills}
        ring_arrays = self._ring.bank(here.number).arrays
        return [
            Place(e, ring_arrays, in_ring[e])
            if e in in_ring
            else Place(e, here.bank.arrays, here.books.slot(e))
            for e in group
        ]

    def _admit(self, here: StoreLayer, rows_of: Mapping[int, int], expert: int) -> None:
        """Copies a hot expert out of the ring, over one that is colder and was computed with already."""
        slot_of_ring = self._ring.slot(here.number, expert)
        books = here.books
        keep = {e for e, rows in rows_of.items() if e in books and (e > expert or rows >= rows_of[expert])}
        if expert in books or expert in here.ahead or books.num_free(keep) == 0:
            return
        slot = books.take(keep)
        here.bank.copy(slot, self._ring.bank(here.number), slot_of_ring)
        books.hold(expert, slot)


def resident_groups(
    arrays: Mapping[str, mx.array], rows_of: Mapping[int, int], at_once: int, slot: Callable[[int], int]
) -> Iterator[Sequence[Place]]:
    """Groups of at most `at_once` places, in ascending id, where each expert stays in its slot."""
    experts = sorted(rows_of)
    for first in range(0, len(experts), at_once):
        yield [Place(expert, arrays, slot(expert)) for expert in experts[first : first + at_once]]


def _hottest(books: Residency, rows_of: Mapping[int, int], missing: Sequence[int]) -> set[int]:
    """The missing experts that most rows want, as many as may be admitted."""
    room = books.num_slots - len(books) + int(ADMITTED_SHARE * books.num_slots)
    return set(sorted(missing, key=lambda expert: (-rows_of[expert], expert))[:room])
