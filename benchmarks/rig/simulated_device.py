"""A store whose callers compute as fast as a simulated device does, beside the simulated disk.

What a step costs a CPU grows with its rows; on the target most of it does not: weights are read once for all
rows, and synchronising takes its time. So the work between two calls of the store lasts as long here as the
device would take, or as long as it really took if that was longer (`late_s`). Reads go on meanwhile.

Few rows cost as in `benchmarks.schedule`: half of a lone token's time is the trunk's, the other half is its
eight routed experts' and the shared one's, and each further expert that a batch wants takes as long again.
Many rows cost by the row: 5 ms where a lone token takes 160 (published for GLM-5.2: 0.12 to 0.16 s of compute
a token, 186 to 211 tokens/s of prefill in memory); experts have 0.57 of that, by their share of the
multiply-adds (eight times 75 experts of 37.75 M of 40 G).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.schedule import TRUNK_SHARE
from streaming.fills import Fetch
from streaming.overflow import Turn
from streaming.store import ExpertStore
from streaming.sweep import Place

ROW_SHARE = 5 / 160
ROUTED_SHARE = 0.57


class PacedStore(ExpertStore):
    """Sleeps where the model computes; a lone token of `top_k` experts a layer takes `token_s` in all."""

    def __init__(self, *args: Any, token_s: float, top_k: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layer_s = token_s / len(self.layers)
        self.late_s = 0.0
        self._top_k = top_k
        self._trunk_s = layer_s * TRUNK_SHARE
        self._expert_s = layer_s * (1 - TRUNK_SHARE) / (top_k + 1)
        self._row_s = layer_s * ROW_SHARE
        self._owed_s, self._since_s = 0.0, time.monotonic()

    def begin(self, layer: int, experts: Sequence[int]) -> Fetch:
        """As `ExpertStore.begin`, once the trunk is computed."""
        self._spend(self._trunk_s)
        fetch = super().begin(layer, experts)
        self._since_s = time.monotonic()
        self._owed_s = self._expert_s * (1 + int(fetch.is_here.sum()))
        return fetch

    def finish(self, fetch: Fetch) -> None:
        """As `ExpertStore.finish`, once what was there is computed."""
        self._spend()
        super().finish(fetch)
        self._since_s = time.monotonic()
        self._owed_s = self._expert_s * int((~fetch.is_here).sum())

    def take_turns(self, layer: int, experts: Sequence[int]) -> Iterator[Turn]:
        """As `ExpertStore.take_turns`; each turn lasts as long as its experts take."""
        self._spend(self._trunk_s + self._expert_s)
        for turn in super().take_turns(layer, experts):
            self._since_s = time.monotonic()
            yield turn
            self._spend(self._expert_s * len(turn[0]))

    def sweep(self, layer: int, rows_of: Mapping[int, int], at_once: int) -> Iterator[Sequence[Place]]:
        """As `ExpertStore.sweep`; each group lasts as long as its experts' rows take."""
        num_pairs = sum(rows_of.values())
        self._spend(num_pairs / self._top_k * self._row_s * (1 - ROUTED_SHARE))
        for group in super().sweep(layer, rows_of, at_once):
            self._since_s = time.monotonic()
            yield group
            pairs = sum(rows_of[place.expert] for place in group)
            self._spend(pairs / self._top_k * self._row_s * ROUTED_SHARE)

    def _spend(self, seconds: float = 0.0) -> None:
        """Until the device has done what is owed and so much more since the last call; its work is done."""
        seconds += self._owed_s
        self._owed_s = 0.0
        left_s = self._since_s + seconds - time.monotonic()
        self.late_s += max(0.0, -left_s)
        time.sleep(max(0.0, left_s))
        self._since_s = time.monotonic()
