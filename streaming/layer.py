"""One layer of the store: its bank, the books of its slots, and the reads under way into them.

Made and called by the store, on its thread. Some reads are waited for; others run ahead of anybody's asking
and give way to those.
"""

from collections import Counter
from collections.abc import Collection, Container, Sequence

import mlx.core as mx

from config.errors import DiskError
from streaming.banks import Bank
from streaming.disk.reads import ReadClass
from streaming.fills import Fill, Filler, raise_failure
from streaming.residency import Residency
from streaming.statistics import LayerHeat, StoreStatistics, as_cells

# A read of which half are wanted moves as many wasted bytes as useful ones. Published: precision of the first
# rank 95 %, of the seventh 42 %, of the ninth 22 %.
THRESHOLD = 0.5
# About the last fifty predictions of a rank count.
DECAY = 0.98
# Until it has been judged a rank is given the benefit of the doubt.
FIRST_GUESS = 0.7


class Gate:
    """Judges which predicted experts of one layer are worth reading ahead, from one distance.

    A prediction comes in ranks, the likeliest first. A rank is read as long as, lately, enough of its experts
    that were not resident were then wanted. It is judged also while it is not read, so it can open again.
    """

    def __init__(self) -> None:
        self._precision: list[float] = []
        self._open_question: list[tuple[int, int]] = []  # rank, expert

    def choose(self, ranks: Sequence[Sequence[int]], resident: Container[int]) -> list[int]:
        """The experts worth reading, likeliest first, out of `ranks[rank][row]`; notes all for `judge`."""
        self._precision += [FIRST_GUESS] * (len(ranks) - len(self._precision))
        seen: set[int] = set()
        self._open_question = []
        for rank, experts in enumerate(ranks):
            for expert in experts:
                if expert not in seen and expert not in resident:
                    seen.add(expert)
                    self._open_question.append((rank, expert))
        return [expert for rank, expert in self._open_question if self._precision[rank] >= THRESHOLD]

    def judge(self, wanted: Collection[int]) -> None:
        """Compares the last prediction with the experts that the layer then asked for."""
        for rank, expert in self._open_question:
            hit = float(expert in wanted)
            self._precision[rank] += (1 - DECAY) * (hit - self._precision[rank])
        self._open_question = []


# On the simulated disk, with eight rows, 256 experts and 64 slots, 4, 8, 16 and 28 guesses a layer made a
# step 5, 6, 7 and 1 % faster; with 58 slots, 7 guesses 4 %.
LEAST_GUESSED = 4


class Lease:
    """A layer's slots while lazy products that read them are not evaluated yet.

    A lazy product reads a slot when it is evaluated, so the store moves experts only under a released lease.
    """

    def __init__(self) -> None:
        self._product: mx.array | None = None

    @property
    def is_released(self) -> bool:
        """Whether no product is pending."""
        return self._product is None

    def hold(self, product: mx.array) -> mx.array:
        """Holds the slots until `product` is evaluated; returns it."""
        self._product = product
        return product

    @staticmethod
    def release(leases: "Sequence[Lease]", *beside: mx.array | None) -> None:
        """Evaluates what these leases hold, and `beside` in the same synchronisation."""
        mx.eval(*(a for a in (*beside, *(lease._product for lease in leases)) if a is not None))
        for lease in leases:
            lease._product = None


class StoreLayer:
    """Brings experts into the slots of one layer; the store's counts are counted on."""

    def __init__(
        self,
        number: int,
        bank: Bank,
        books: Residency,
        filler: Filler,
        expert_bytes: int,
        counts: StoreStatistics,
    ) -> None:
        self.number, self.bank, self.books = number, bank, books
        self.lease = Lease()
        self.ahead: dict[int, Fill] = {}  # under way before anybody asked
        self._filler, self._expert_bytes, self._counts = filler, expert_bytes, counts
        self.num_hits = self.num_misses = 0  # experts asked for that lay here, and that did not
        self._num_asked: Counter[int] = Counter()  # by expert
        self._gates: dict[int, Gate] = {}  # by how many layers before it was guessed
        self._fresh: set[int] = set()  # arrived ahead since the layer was last asked
        self._table: mx.array | None = None

    @property
    def under_way(self) -> list[Fill]:
        """Reads ahead that are under way."""
        return list(self.ahead.values())

    def __contains__(self, expert: object) -> bool:
        """Whether the expert is resident or being read ahead."""
        return expert in self.books or expert in self.ahead

    def heat(self, num_experts: int) -> LayerHeat:
        """Returns hits, misses and cells of this layer."""
        return self.num_hits, self.num_misses, as_cells(num_experts, self._num_asked, self.books.residents)

    def slot_table(self, num_experts: int) -> mx.array | None:
        """Each expert's slot, int32 [experts], if all are there: then none moves before the next `resize`."""
        if len(self.books) < num_experts:
            return None
        if self._table is None:
            self._table = mx.array([self.books.slot(expert) for expert in range(num_experts)], mx.int32)
        return self._table

    def begin(self, experts: Sequence[int]) -> Sequence[Fill]:
        """Starts to read those of the experts that are not resident. Returns the fills to wait for."""
        joined, missed = self.ask(experts)
        try:
            return [*joined.values(), *self._start_missed(missed, frozenset(experts))]
        except DiskError:  # nobody waits for those on their way now
            for fill in joined.values():
                self.give_up(fill)
            raise

    def ask(self, experts: Sequence[int]) -> tuple[dict[int, Fill], list[int]]:
        """Records that a step needs these experts.

        Returns those being read ahead, and those that are to be read.
        """
        for gate in self._gates.values():
            gate.judge(experts)
        self.books.ask(experts)
        joined = self.join_ahead(experts)
        missed = [expert for expert in experts if expert not in self.books and expert not in joined]
        self._count(experts, len(missed), len(joined))
        # Used before the others are held, in every kind of bank: what was read is the most recent.
        self.books.use([expert for expert in experts if expert in self.books])
        return joined, missed

    def start(self, missed: Sequence[int], keep: Collection[int]) -> Sequence[Fill]:
        """Starts to read at most `bank.max_fill` experts, into slots of experts not in `keep`."""
        slots = [self.books.take(keep) for _ in missed]
        self.bank.begin(slots)
        fills = [
            self._filler.make(self.number, self.bank, expert, slot, ReadClass.DEMAND)
            for expert, slot in zip(missed, slots, strict=True)
        ]
        if fills:
            self._filler.submit(fills)
        return fills

    def bring_back(self, experts: Sequence[int]) -> int:
        """As `ExpertStore.bring_back`."""
        self._land_ahead()
        missed = [expert for expert in experts if expert not in self]
        missed = missed[len(missed) - min(len(missed), self.books.num_free(self.books.residents)) :]
        stall_s = self._counts.stall_s
        for first in range(0, len(missed), self.bank.max_fill):
            self.wait(self.start(missed[first : first + self.bank.max_fill], self.books.residents))
        self._counts.stall_s = stall_s  # no step waited
        return len(missed)

    def wait(self, fills: Sequence[Fill]) -> None:
        """Returns once all are in their slots. DiskError names one that could not be read."""
        self._counts.stall_s += self._filler.wait(fills)
        for fill in fills:
            self._land(fill)
        self.bank.finish([fill.slot for fill in fills if fill.error is None])
        failed = [fill for fill in fills if fill.error is not None]
        self._counts.failures += len(failed)
        raise_failure(self.number, failed)

    def give_up(self, fill: Fill) -> None:
        """Frees the slot of an unwanted fill. It cannot be taken while a read may still write into it."""
        self._filler.void(fill)
        if not self.bank.is_in_place:  # the staging rows are shared by all slots
            self._filler.wait([fill])
        self.books.release(fill.slot)

    def expect(self, ranks: Sequence[Sequence[int]], distance: int) -> None:
        """As `ExpertStore.expect`."""
        self._land_ahead()
        keep = frozenset(expert for experts in ranks for expert in experts)
        # Half of what the rows may leave over stays for what was not foreseen. Where they may want all, so
        # many are read that the disk has time for them.
        num_slots, num_wanted = self.books.num_slots, sum(map(len, ranks))
        room = max(num_slots - num_wanted, num_slots // LEAST_GUESSED) // 2 - len(self.ahead)
        room = min(room, self.books.num_free(keep))
        gate = self._gates.setdefault(distance, Gate())
        for expert in gate.choose(ranks, self)[: max(0, room)]:
            self.ahead[expert] = fill = self._make(expert, keep, ReadClass.LOOKAHEAD)
            self._filler.submit([fill])
            self._counts.ahead_started += 1

    def join_ahead(self, experts: Sequence[int]) -> dict[int, Fill]:
        """Hastens the reads ahead of these experts, cancels the others.

        Returns the hastened fills by expert.
        """
        self._land_ahead()
        joined = {}
        for expert, fill in list(self.ahead.items()):
            if expert in experts:
                self._filler.hasten(fill)
                joined[expert] = self.ahead.pop(expert)
            elif self._filler.cancel(fill):
                self.give_up(self.ahead.pop(expert))
        return joined

    def resize(self, num_slots: int) -> None:
        """As `ExpertStore.resize`. Gives up the reads that run ahead, without waiting for them."""
        self._land_ahead()
        while self.ahead:
            self._give_up_one()
        self._table = None
        kept = self.books.shed(num_slots)
        self.bank.resize(kept, num_slots)
        self._filler.renew(self.number)
        self.books.resize(kept, num_slots)
        self._fresh = {expert for expert in self._fresh if expert in self.books}

    def check(self) -> None:
        """Every slot is free, held or being filled."""
        assert not any(expert in self.books for expert in self.ahead), "an expert has two slots"
        self.books.check([fill.slot for fill in self.under_way])

    def _start_missed(self, missed: Sequence[int], keep: frozenset[int]) -> Sequence[Fill]:
        """Starts to read all of these experts; waits for them where the bank is filled by scatter."""
        if missed:
            self.make_room(len(missed), keep)
        if self.bank.is_in_place:
            return self.start(missed, keep)
        for first in range(0, len(missed), self.bank.max_fill):
            self.wait(self.start(missed[first : first + self.bank.max_fill], keep))
        return ()

    def make_room(self, num_wanted: int, keep: Collection[int]) -> None:
        """Gives up reads ahead until `num_wanted` slots can be taken; waits for voided reads only if it must.

        DiskError if hung reads hold too many slots.
        """
        while self.ahead and self.books.num_free(keep) < num_wanted:
            self._give_up_one()
        while self.books.num_free(keep) < num_wanted:
            if not self._filler.wait_for_voided(self.number) and self.books.num_free(keep) < num_wanted:
                raise DiskError(f"layer {self.number}: reads that the disk never answered hold its slots")

    def _give_up_one(self) -> None:
        self.give_up(self.ahead.popitem()[1])

    def _make(self, expert: int, keep: Collection[int], read_class: ReadClass) -> Fill:
        return self._filler.make(self.number, self.bank, expert, self.books.take(keep), read_class)

    def _land(self, fill: Fill) -> None:
        """Enters a settled fill into the books."""
        if fill.error is None:
            self.books.hold(fill.expert, fill.slot)
            self._counts.payload_bytes += self._expert_bytes
        else:
            self.give_up(fill)

    def _land_ahead(self) -> None:
        for expert, fill in [item for item in self.ahead.items() if item[1].is_settled]:
            del self.ahead[expert]
            self._filler.wait([fill])
            self._land(fill)
            if fill.error is None:
                self._fresh.add(expert)
                self._counts.ahead_arrived += 1

    def _count(self, experts: Sequence[int], num_missed: int, num_joined: int) -> None:
        # One that came ahead may have been given up before anybody asked.
        num_ahead = num_joined + sum(expert in self.books for expert in self._fresh.intersection(experts))
        self._fresh.clear()
        self._num_asked.update(experts)
        self.num_hits += len(experts) - num_missed - num_ahead
        self.num_misses += num_missed + num_ahead
        self._counts.misses += num_missed
        self._counts.ahead_used += num_ahead
        self._counts.ahead_arrived += num_joined
        self._counts.hits += len(experts) - num_missed - num_ahead
