"""A Mac's memory as its kernel weighs it, and banks at GLM-5.2's size that only count: no byte is moved.

The rule is XNU's (vm_pageout.c): a warning when less than 50 % of what is neither wired nor free of use is
uncompressed, none again above 60 %. What banks give back becomes uncompressed memory at once; the level
follows `lag_s` later. Used by the tests of the governor and by `benchmarks.target.governor`.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from config.plan import Geometry, MemoryPlan
from server.engine.memory.governor import Governor
from server.engine.memory.pressure import KernelRoom, MeasureRoom
from streaming.eviction.contest import make_rule
from streaming.store import ExpertStore

GB = 10**9
LAYERS = tuple(range(3, 78))
SLOTS, SLOT_BYTES = 62, 16_515_072
WHOLE = len(LAYERS) * SLOTS * SLOT_BYTES
EXPERTS, K = 256, 8


@dataclass
class CountedBanks:
    """As much of a store as the governor uses. `copied_bytes`: what moving banks has copied."""

    slots: dict[int, int] = field(default_factory=lambda: dict.fromkeys(LAYERS, SLOTS))
    copied_bytes: int = 0
    layers = LAYERS

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        return sum(self.slots.values()) * SLOT_BYTES

    @property
    def total_slots(self) -> int:
        """Slots of all layers."""
        return sum(self.slots.values())

    def num_slots(self, layer: int) -> int:
        """Slots of one layer."""
        return self.slots[layer]

    def resize(self, layer: int, num_slots: int) -> None:
        """Copies what is kept."""
        self.copied_bytes += min(num_slots, self.slots[layer]) * SLOT_BYTES
        self.slots[layer] = num_slots


@dataclass
class Mac:
    """128 GiB, of which `others_bytes` are neither wired nor free of use while all banks are whole."""

    banks: CountedBanks
    others_bytes: int = 28 * GB
    compressed_bytes: int = 0
    lag_s: float = 0.0
    now_s: float = 0.0
    num_warnings: int = 0
    is_warned: bool = False
    _seen: list[tuple[float, int, int]] = field(default_factory=list)

    def clock(self) -> float:
        """The time of the simulation."""
        return self.now_s

    @property
    def uncompressed_bytes(self) -> int:
        """Pages neither wired nor compressed: what banks gave back is among them."""
        given_back = WHOLE - self.banks.slot_bytes
        return self.others_bytes - self.compressed_bytes + given_back

    def pass_second(self) -> None:
        """Lets the kernel judge what it saw `lag_s` ago."""
        self.now_s += 1.0
        self._seen.append((self.now_s, self.uncompressed_bytes, self.compressed_bytes))
        _, free, compressed = next(one for one in self._seen if one[0] >= self.now_s - self.lag_s)
        if not self.is_warned and free < 0.5 * (free + compressed):
            self.is_warned = True
            self.num_warnings += 1
        elif self.is_warned and free > 0.6 * (free + compressed):
            self.is_warned = False

    def room(self) -> KernelRoom:
        """What the governor measures."""
        return KernelRoom(self.uncompressed_bytes, 128 * 2**30, self.compressed_bytes, self.is_warned)


def govern(mac: Mac, measure_room: MeasureRoom | None = None) -> Governor:
    """The product's governor over the Mac's banks; `measure_room`: another reading of its memory."""
    geometry = SimpleNamespace(experts_per_token=K, expert_bytes=[SLOT_BYTES] * len(LAYERS))
    plan = SimpleNamespace(slots_per_layer=[SLOTS] * len(LAYERS), lines={"experts": WHOLE})
    return Governor(
        cast(ExpertStore, mac.banks),
        cast(Geometry, geometry),
        cast(MemoryPlan, plan),
        lambda: None,
        lambda name: make_rule(name, EXPERTS, K),
        make_rule("lru", EXPERTS, K),
        measure_room=measure_room or mac.room,
        clock=mac.clock,
    )


def run(mac: Mac, governor: Governor, seconds: int) -> None:
    """Two steps a second."""
    for _ in range(seconds):
        mac.pass_second()
        for _ in range(2):
            while governor.govern():
                pass
