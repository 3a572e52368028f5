"""Slots that hold experts only while a sweep computes with them.

Owned by the store, called on its thread. A sweep asks for experts in the order in which it will compute
them; as many as there are slots are on their way at any time, and each slot that was computed with takes
the next. The order may go on into the next layer, so that the disk does not rest while attention runs.
"""

from collections import deque
from collections.abc import Callable, Sequence

from config.errors import DiskError
from streaming.banks import Bank
from streaming.disk.reads import ReadClass
from streaming.files.index import ExpertIndex, Part
from streaming.fills import Fill, Filler

Key = tuple[int, int]  # layer, expert


class _Lane:
    """The slots that layers of like experts share."""

    def __init__(self, name: str, bank: Bank, num_slots: int) -> None:
        self.name, self.bank, self.num_slots = name, bank, num_slots
        self.free = list(range(num_slots))


class Ring:
    """At most `num_slots` experts of a kind, read in the order asked for."""

    def __init__(
        self,
        index: ExpertIndex,
        filler: Filler,
        make_bank: Callable[[tuple[Part, ...], int], Bank],
        num_slots: int,
    ) -> None:
        self.num_slots = num_slots
        self.unused_bytes = 0  # read and then not asked for
        self._index, self._filler = index, filler
        lanes: dict[tuple[Part, ...], _Lane] = {}
        for layer in index.layers if num_slots else ():
            parts = index.parts(layer)
            if parts not in lanes:
                lanes[parts] = _Lane(f"ring {len(lanes)}", make_bank(parts, num_slots), num_slots)
        self._lane_of = {layer: lanes[index.parts(layer)] for layer in index.layers if lanes}
        self._wanted: deque[Key] = deque()
        self._fills: dict[Key, Fill] = {}

    def begin(self, order: Sequence[Key]) -> None:
        """Begins to read these experts in this order; drops reads under way whose turn is too far off."""
        window = {key for lane in set(self._lane_of.values()) for key in self._first_of(lane, order)}
        for key, fill in list(self._fills.items()):
            if key not in window or fill.error is not None:
                self._drop(key)
        self._wanted = deque(key for key in order if key not in self._fills)
        self._start()

    def bring(self, layer: int, experts: Sequence[int]) -> tuple[list[Fill], float]:
        """Waits for the next experts of the order, at most a lane's slots.

        Returns their fills and the seconds waited.
        """
        lane = self._lane_of[layer]
        if not lane.bank.is_in_place:
            return self._bring_staged(lane, layer, experts)
        may_come = True
        while any((layer, expert) not in self._fills for expert in experts):
            if not may_come:
                raise DiskError(f"layer {layer}: reads that the disk never answered hold its slots")
            may_come = self._filler.wait_for_voided(lane.name)
            self._start()
        fills = [self._fills[layer, expert] for expert in experts]
        return fills, self._filler.wait(fills)

    def bank(self, layer: int) -> Bank:
        return self._lane_of[layer].bank

    def slot(self, layer: int, expert: int) -> int:
        return self._fills[layer, expert].slot

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Frees the slots of experts whose products are evaluated, for the next of the order."""
        for expert in experts:
            self._lane_of[layer].free.append(self._fills.pop((layer, expert)).slot)
        self._start()

    def clear(self) -> None:
        """Drops all reads under way and frees all slots."""
        self._wanted.clear()
        for key in list(self._fills):
            self._drop(key)

    @property
    def nbytes(self) -> int:
        lanes = set(self._lane_of.values())
        return sum(array.nbytes for lane in lanes for array in lane.bank.arrays.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way or held."""
        return not self._wanted and not self._fills

    @property
    def is_reading(self) -> bool:
        return any(not fill.is_settled for fill in self._fills.values())

    def check(self) -> None:
        """Every slot is free or filled for one expert."""
        for lane in set(self._lane_of.values()):
            held = [fill.slot for key, fill in self._fills.items() if self._lane_of[key[0]] is lane]
            assert sorted([*lane.free, *held]) == list(range(lane.num_slots)), f"{lane.name}: a slot is lost"

    def _first_of(self, lane: _Lane, order: Sequence[Key]) -> list[Key]:
        """The experts of the order that get a slot of the lane now."""
        num_held = sum(self._filler.is_written(lane.name, slot) for slot in lane.free)
        return [key for key in order if self._lane_of[key[0]] is lane][: lane.num_slots - num_held]

    def _start(self) -> None:
        while self._wanted:
            lane = self._lane_of[self._wanted[0][0]]
            if not lane.bank.is_in_place or self._usable(lane) is None:
                return
            self._filler.submit([self._make(lane, *self._wanted.popleft(), self._take(lane))])

    def _usable(self, lane: _Lane) -> int | None:
        """A free slot that no read which hangs may yet write into."""
        return next((slot for slot in lane.free if not self._filler.is_written(lane.name, slot)), None)

    def _take(self, lane: _Lane) -> int:
        slot = self._usable(lane)
        assert slot is not None, "an expert is read once there is a slot for it"
        lane.free.remove(slot)
        return slot

    def _make(self, lane: _Lane, layer: int, expert: int, slot: int) -> Fill:
        fill = self._filler.make(layer, lane.bank, expert, slot, ReadClass.SWEEP, owner=lane.name)
        self._fills[layer, expert] = fill
        return fill

    def _bring_staged(self, lane: _Lane, layer: int, experts: Sequence[int]) -> tuple[list[Fill], float]:
        """Reads experts into a bank that is filled by way of staging rows.

        Nothing ahead, because layers share those rows.
        """
        fills, waited_s = [], 0.0
        for first in range(0, len(experts), lane.bank.max_fill):
            some = experts[first : first + lane.bank.max_fill]
            slots = [self._take(lane) for _ in some]
            lane.bank.begin(slots)
            part = [self._make(lane, layer, *pair) for pair in zip(some, slots, strict=True)]
            self._filler.submit(part)
            waited_s += self._filler.wait(part)
            lane.bank.finish([fill.slot for fill in part if fill.error is None])
            fills += part
        self._wanted = deque(key for key in self._wanted if key not in self._fills)
        return fills, waited_s

    def _drop(self, key: Key) -> None:
        fill, lane = self._fills.pop(key), self._lane_of[key[0]]
        self._filler.void(fill)
        if fill.is_settled and fill.error is None:
            self.unused_bytes += self._index.expert_bytes(key[0])
        lane.free.append(fill.slot)
