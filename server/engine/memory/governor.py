"""How many experts the banks hold at this moment: as many as the plan says, or fewer while memory is short.

The governor owns the plan in force and what of it the banks are granted, the same part in every layer. The
loop calls it between two steps, on its thread. There are two reasons for banks to move: the plan is another
one, or the system has little memory left. Then the banks give up what is missing, down to what a token's
experts need, before a neighbour is refused memory or this process is killed; when there has been room for a
while they grow back, part by part.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Protocol

from config.defaults import ExpertPolicy
from config.errors import BudgetError
from config.plan import Geometry, MemoryPlan
from config.plan_report import as_dict, render_plan
from config.replan import replan
from config.sizes import format_size
from server.engine.memory.pressure import MeasureRoom, Room
from server.link.messages import Failed, Replan, Replanned
from streaming.eviction.contest import Rule
from streaming.store import ExpertStore

# The system's files are read so often; each look costs less than a millisecond.
LOOK_S = 1.0
# Banks grow by one of so many parts of the plan's experts, after a pause with room for it. A growth copies
# every bank, and the memory stays theirs only if the program that had it before is really gone.
GROWTHS = 8
PAUSE_S = 30.0
# A growth that had to be taken back multiplies the pause, up to the longest; a growth that stays halves it.
# So a program that comes and goes does not drive the banks up and down with it.
PATIENCE, LONGEST_PAUSE_S = 4, 960.0

# Where the system warns early, what is missing is given back once, by few banks that lose nearly half: moving
# a bank copies what it keeps. The kernel's own thread needs a while to see it.
KEPT_SHARE, SETTLE_S = 0.55, 10.0

log = logging.getLogger(__name__)


class Memory(Protocol):
    """The plan in force while the engine runs, as the loop sees it."""

    @property
    def pause_s(self) -> float | None:
        """How long the loop may rest until `govern` must be called again; None: for ever."""

    def govern(self) -> bool:
        """Moves at most one bank, between two steps. Returns True to be called again before the next step."""

    def replan(self, command: Replan) -> Replanned | Failed:
        """Takes another plan, if that needs no restart."""

    def measure(self) -> Mapping[str, float]:
        """Counts for /metrics."""


class Ungoverned:
    """The plan of an engine whose experts all stay in memory: it never changes."""

    pause_s = None

    def govern(self) -> bool:
        """There is nothing to move."""
        return False

    def replan(self, command: Replan) -> Failed:
        """Refuses: only a restart changes anything."""
        message = "every expert stays in memory here, so another budget or policy needs a restart"
        return Failed(command.request_id, "request", message)

    def measure(self) -> Mapping[str, float]:
        """Nothing moves."""
        return {}


class Governor:
    """Moves the banks of a store to what the plan and the room allow.

    `settle` evaluates whatever may still read a slot.
    """

    def __init__(
        self,
        store: ExpertStore,
        geometry: Geometry,
        plan: MemoryPlan,
        settle: Callable[[], None],
        make_rule: Callable[[ExpertPolicy], Rule],
        rule: Rule,
        *,
        measure_room: MeasureRoom,
        on_plan: Callable[[MemoryPlan], None] = lambda plan: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.plan = plan
        self._store, self._geometry, self._settle = store, geometry, settle
        self._make_rule, self._rule = make_rule, rule
        self._measure_room, self._on_plan, self._clock = measure_room, on_plan, clock
        self._room: Room | None = None
        self._num_shrinks = 0
        self._look_s = self._grown_s = self._settled_s = float("-inf")
        self._pause_s, self._until_s, self._least_bytes = PAUSE_S, 0.0, 0
        self._slots = self._planned
        self._is_moving = False
        self._wait(clock())

    @property
    def pause_s(self) -> float:
        return 0.0 if self._is_moving else LOOK_S

    def measure(self) -> Mapping[str, float]:
        values = {"slots_planned": sum(self.plan.slots_per_layer), f"policy.{self._rule.decides}": 1.0}
        if self._rule.gain is not None:
            values["policy_gain"] = self._rule.gain
        values["shrinks"] = self._num_shrinks
        return values | ({"available_bytes": self._room.available_bytes} if self._room else {})

    def govern(self) -> bool:
        now_s = self._clock()
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_S
            self._look(now_s)
        return self._move() if self._is_moving else False

    def replan(self, command: Replan) -> Replanned | Failed:
        before = self.plan
        try:
            plan = replan(self._geometry, before, command.ram_budget_bytes or before.budget_bytes)
        except BudgetError as error:
            return Failed(command.request_id, "request", str(error))
        if command.expert_policy and command.expert_policy != self._rule.name:
            self._rule = self._make_rule(command.expert_policy)
            self._store.follow(self._rule)
        self.plan = plan
        if plan != before:
            log.info("the budget is %s now", format_size(plan.budget_bytes))
            self._on_plan(plan)
            room = self._room = self._measure_room()
            self._raise(room.spare_bytes if room else plan.budget_bytes)
            self._wait(self._clock())
        lines = tuple(render_plan(plan).splitlines())
        return Replanned(command.request_id, plan.budget_bytes, self._rule.name, as_dict(plan), lines)

    # how much

    def _look(self, now_s: float) -> None:
        room = self._room = self._measure_room()
        if room is None:
            return
        if room.is_short:
            if not room.warns_early:
                self._shrink(self._share(self._store.slot_bytes + room.spare_bytes), now_s)
            elif not self._is_moving and now_s >= self._settled_s:
                self._shrink(self._without(-room.spare_bytes), now_s)
            return
        self._least_bytes = min(self._least_bytes, room.spare_bytes)
        if now_s < self._until_s:
            return
        spare = self._least_bytes
        self._wait(now_s)
        if spare > 0 and not self._is_moving and self._slots != self._planned:
            self._grow(spare, now_s)

    def _shrink(self, slots: dict[int, int], now_s: float) -> None:
        before, self._slots = self._slots, slots
        is_again = now_s - self._grown_s < 2 * self._pause_s
        self._pause_s = min(PATIENCE * self._pause_s, LONGEST_PAUSE_S) if is_again else PAUSE_S
        self._wait(now_s)
        self._is_moving = True
        if self._slots != before:
            self._num_shrinks += 1
            self._tell("memory is short")

    def _grow(self, spare_bytes: int, now_s: float) -> None:
        before = self._slots
        part = max(self.plan.lines["experts"] // GROWTHS, sum(self._geometry.expert_bytes))
        if self._room and self._room.warns_early:
            self._restore(min(spare_bytes, part))
        else:
            self._raise(min(spare_bytes, part))
        if self._slots != before:
            self._pause_s = max(self._pause_s / 2, PAUSE_S)
            self._grown_s = now_s
            self._tell("there is room again")

    def _raise(self, more_bytes: int) -> None:
        """Raises each bank's target to its share of the present total plus `more_bytes`; never lowers one."""
        share = self._share(self._store.slot_bytes + more_bytes)
        self._slots = {
            layer: min(slots, max(share[layer], self._store.num_slots(layer)))
            for layer, slots in self._planned.items()
        }
        self._is_moving = True

    def _restore(self, more_bytes: int) -> None:
        """Raises banks to their planned size, one after the other, as far as `more_bytes` go."""
        slots = self._held()
        for layer, planned in self._planned.items():
            more = (planned - slots[layer]) * self._slot_bytes[layer]
            if 0 < more <= more_bytes:
                slots[layer], more_bytes = planned, more_bytes - more
        self._slots, self._is_moving = slots, True

    def _without(self, missing_bytes: int) -> dict[int, int]:
        """Slots per layer after as few banks as possible, the largest first, gave back `missing_bytes`."""
        slots, least = self._held(), self._geometry.experts_per_token
        while missing_bytes > 0:
            layer = max(slots, key=lambda one: slots[one] * self._slot_bytes[one])
            fewer = max(min(least, slots[layer]), int(KEPT_SHARE * slots[layer]))
            if fewer == slots[layer]:
                break
            missing_bytes -= (slots[layer] - fewer) * self._slot_bytes[layer]
            slots[layer] = fewer
        return slots

    def _held(self) -> dict[int, int]:
        return {layer: self._store.num_slots(layer) for layer in self._store.layers}

    @property
    def _slot_bytes(self) -> Mapping[int, int]:
        return dict(zip(self._store.layers, self._geometry.expert_bytes, strict=True))

    def _share(self, nbytes: int) -> dict[int, int]:
        """Slots per layer that fit into `nbytes`, in the plan's proportions; at least what a token needs."""
        whole, least = self.plan.lines["experts"], self._geometry.experts_per_token
        return {
            layer: max(min(least, slots), slots * max(0, min(nbytes, whole)) // whole)
            for layer, slots in self._planned.items()
        }

    @property
    def _planned(self) -> dict[int, int]:
        return dict(zip(self._store.layers, self.plan.slots_per_layer, strict=True))

    def _wait(self, now_s: float) -> None:
        """Begins a pause. At its end banks grow by no more than the least room seen during it."""
        self._until_s, self._least_bytes = now_s + self._pause_s, sys.maxsize

    def _tell(self, why: str) -> None:
        log.info(
            "%s (%s available): the banks go from %d to %d experts, of %d planned",
            why,
            format_size(self._room.available_bytes if self._room else 0),
            self._store.total_slots,
            sum(self._slots.values()),
            sum(self.plan.slots_per_layer),
        )

    # where to

    def _move(self) -> bool:
        """Moves one bank; those that shrink come first. Returns True if another has to shrink."""
        changes = [(slots - self._store.num_slots(layer), layer) for layer, slots in self._slots.items()]
        changes = sorted(change for change in changes if change[0])
        if not changes:
            self._is_moving = False
            self._settled_s = self._clock() + SETTLE_S
            return False
        _, layer = changes[0]
        try:
            self._settle()
            self._store.resize(layer, self._slots[layer])
        except RuntimeError as error:  # MLX could not allocate the new bank, so the old one stays in use
            log.warning("the bank of layer %d keeps its size: %s", layer, error)
            self._slots = self._held()
            self._wait(self._clock())
        is_early = self._room is not None and self._room.warns_early  # steps go on in between
        return not is_early and len(changes) > 1 and changes[1][0] < 0
