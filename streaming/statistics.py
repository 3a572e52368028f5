"""Counts of the store. Written on the engine's thread; others get copies."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Of one layer: experts asked for that lay in memory, that did not, and the cells of `as_cells`.
LayerHeat = tuple[int, int, bytes]
# A cell's highest bit; the other seven hold 4 * log2(1 + how often the expert was asked for).
IN_MEMORY = 128


@dataclass
class StoreStatistics:
    """Counts since start-up.

    Every expert asked for by a few rows is a hit (it lay there), was read ahead (`ahead_used`: it lay there
    or was under way because of a prediction), or a miss. Those of a sweep lay there (`sweep_hits`) or passed
    through the ring (`sweep_reads`). `payload_bytes`: of experts that arrived, ahead or not;
    `device_bytes`: read for them, with what alignment adds. `read_s`: time during which any read was
    outstanding; `stall_s`: time that the engine waited for reads.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    payload_bytes: int = 0
    device_bytes: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    num_reads: int = 0
    num_timeouts: int = 0
    ahead_started: int = 0
    ahead_arrived: int = 0
    ahead_used: int = 0
    sweep_hits: int = 0
    sweep_reads: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that nobody had to read."""
        asked = self.hits + self.ahead_used + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def ahead_recall(self) -> float:
        """Share of the experts that were not there which lookahead had begun to read."""
        wanted = self.ahead_used + self.misses
        return self.ahead_used / wanted if wanted else 0.0

    @property
    def ahead_precision(self) -> float:
        """Share of the experts read ahead that were wanted then."""
        return self.ahead_used / self.ahead_started if self.ahead_started else 0.0


def as_cells(num_experts: int, num_asked: Mapping[int, int], residents: Collection[int]) -> bytes:
    """Returns one byte for each expert: whether it lies in memory, and how often steps asked for it."""
    asked = np.zeros(num_experts)
    asked[list(num_asked)] = list(num_asked.values())
    cells: npt.NDArray[np.uint8] = np.minimum(np.rint(4 * np.log2(1 + asked)), IN_MEMORY - 1).astype(np.uint8)
    cells[list(residents)] |= IN_MEMORY
    return bytes(cells)
