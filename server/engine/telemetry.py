"""What the engine's experts cost, told to the HTTP side. Runs on the engine's thread.

Stands between the loop and the pipe: at the end of each request, and now and then on the way, it sends the
counts before the event that gave the occasion.
"""

import time
from collections.abc import Callable, Mapping

from config.plan import MemoryPlan
from server.engine.memory.usage import MemoryUse
from server.link.messages import Event, Failed, Finished, Heartbeat, Heat, Queued, Started, Stats
from streaming.disk.probe import DiskProbe
from streaming.store import ExpertStore

INTERVAL_S = 5.0
HEARTBEAT_S = 0.5
# How soon a change in the number of requests is told, at the latest, beside the time of a layer.
CROWD_S = 0.05
CROWD = ("running", "waiting", "agents")

Measure = Callable[[], Mapping[str, float]]


class Telemetry:
    """Passes events on, with a Stats event where one is due, and says that the loop is alive."""

    def __init__(
        self, measure: Measure, send: Callable[[Event], None], take_heat: Callable[[], Heat] = dict
    ) -> None:
        self._measure, self._send_on, self._take_heat = measure, send, take_heat
        self._heat: Heat = {}
        self._is_heat_old = False
        self._measure_loop: Measure = dict
        self._sent: Mapping[str, float] = {}
        self._stats_s = self._alive_s = self._looked_s = time.monotonic()
        if values := measure():
            send(Stats(dict(values)))

    def watch(self, measure_loop: Measure) -> None:
        """The loop's own counts are told as well, from now on."""
        self._measure_loop = measure_loop

    def send(self, event: Event) -> None:
        if isinstance(event, Started | Queued):
            self._looked_s = 0.0  # told with the next beat, before its first token
        if isinstance(event, Finished | Failed):
            self._send_stats()
        self._send_on(event)

    def beat(self, is_idle: bool) -> None:
        """The loop has come to another layer or step, or to its rest."""
        now_s = time.monotonic()
        if is_idle or now_s - self._stats_s > INTERVAL_S:
            self._send_stats()
        elif self._has_changed(now_s):
            self._send_stats(with_heat=False)
        if not is_idle and now_s - self._alive_s > HEARTBEAT_S:
            self._alive_s = now_s
            self._send_on(Heartbeat())

    def _has_changed(self, now_s: float) -> bool:
        """Whether other requests are here than was told last."""
        if now_s - self._looked_s < CROWD_S:
            return False
        self._looked_s = now_s
        crowd = self._measure_loop()
        return any(crowd.get(name) != self._sent.get(name) for name in CROWD)

    def _send_stats(self, *, with_heat: bool = True) -> None:
        """Sends the counts if they have changed. At GLM-5.2's shapes the heat takes a millisecond or two."""
        self._stats_s = time.monotonic()
        told = {**self._measure(), **self._measure_loop()}
        has_changed = told != self._sent
        self._is_heat_old |= has_changed
        if not has_changed and not (self._is_heat_old and with_heat):
            return
        if with_heat:
            self._heat, self._is_heat_old = self._take_heat(), False
        self._sent = told
        self._send_on(Stats(told, self._heat))


def measure_store(
    store: ExpertStore, plan_in_force: Callable[[], MemoryPlan], use: MemoryUse, probe: DiskProbe | None
) -> Measure:
    """Counts of the store, and the ledger: `planned.LINE` and, where it is known, `used.LINE`."""

    def measure() -> dict[str, float]:
        plan = plan_in_force()
        counts = store.statistics()
        values = {name: float(value) for name, value in vars(counts).items()}
        values |= {"slots": store.total_slots, "resident_experts": store.num_resident}
        values |= {"hit_rate": counts.hit_rate, "ahead_recall": counts.ahead_recall}
        values |= {"ahead_precision": counts.ahead_precision, "budget_bytes": plan.budget_bytes}
        values |= {f"planned.{name}": nbytes for name, nbytes in plan.lines.items()}
        values |= {f"used.{name}": nbytes for name, nbytes in use.lines().items()}
        if probe is not None:
            values |= {"probe_bytes_per_s": probe.bytes_per_s, "probe_depth": probe.depth}
        return values

    return measure


def measure_all(*measures: Measure) -> Measure:
    """The counts of all."""
    return lambda: {name: value for measure in measures for name, value in measure().items()}
