"""What the engine's experts cost, told to the HTTP side and to the log. Runs on the engine's thread.

Stands between the loop and the pipe: at the end of each request, and now and then on the way, it sends the
counts before the event that gave the occasion.
"""

import logging
import time
from collections.abc import Callable, Mapping

from config.plan import MemoryPlan
from config.sizes import format_size
from server.engine.messages import Event, Failed, Finished, Stats
from server.engine.use import MemoryUse
from streaming.probe import DiskProbe
from streaming.store import ExpertStore

INTERVAL_S = 5.0

log = logging.getLogger(__name__)

Measure = Callable[[], Mapping[str, float]]


class Telemetry:
    """Passes events on, with a Stats event where one is due."""

    def __init__(self, measure: Measure, send: Callable[[Event], None]) -> None:
        self._measure, self._send_on = measure, send
        self._before: Mapping[str, float] = measure()
        self._sent_s = time.monotonic()
        if self._before:
            send(Stats(dict(self._before)))

    def send(self, event: Event) -> None:
        is_last = isinstance(event, Finished | Failed)
        if self._before and (is_last or time.monotonic() - self._sent_s > INTERVAL_S):
            values = self._measure()
            self._sent_s = time.monotonic()
            self._send_on(Stats(dict(values)))
            if isinstance(event, Finished | Failed):
                self._log(event.request_id, values)
        self._send_on(event)

    def _log(self, request_id: str, values: Mapping[str, float]) -> None:
        """One sequence runs at a time, so what was counted since the last one ended is this one's."""
        change = {name: value - self._before[name] for name, value in values.items()}
        self._before = values
        asked = change["hits"] + change["ahead_used"] + change["misses"]
        log.info(
            "%s: %.1f %% of %d experts in memory, %s read in %.2f s, waited %.2f s",
            request_id,
            100 * change["hits"] / max(1, asked),
            asked,
            format_size(int(change["device_bytes"])),
            change["read_s"],
            change["stall_s"],
        )


def measure_store(store: ExpertStore, plan: MemoryPlan, use: MemoryUse, probe: DiskProbe | None) -> Measure:
    """Counts of the store, and the ledger: `planned.LINE` and, where it is known, `used.LINE`."""

    def measure() -> dict[str, float]:
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
