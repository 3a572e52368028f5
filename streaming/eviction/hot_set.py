"""Which experts were in memory, in a file, so that a server that starts again need not learn it anew.

Made and called on the store's thread. Each layer's experts are listed as its policy would give them up, and
read back in that order while nothing else is to be done. Ids only: 75 layers of 63 are 20 kB.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.errors import DiskError
from streaming.store import ExpertStore

SAVE_INTERVAL_S = 300.0
# Experts read in one go: 0.1 s of a fast disk, which is what a request waits for that comes meanwhile.
EXPERTS_AT_ONCE = 32

log = logging.getLogger(__name__)


class HotSet:
    """The experts of one store, kept in `path` under the fingerprint of their model."""

    def __init__(
        self,
        store: ExpertStore,
        path: Path,
        fingerprint: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._path, self._fingerprint, self._clock = store, path, fingerprint, clock
        self._started_s = self._saved_s = clock()
        self._num_read = 0
        self._left = self._plan(self._read_file())

    def advance(self) -> bool:
        """Reads some of the experts that were in memory before. False once there is nothing left to read."""
        try:
            for layer, experts in self._left:
                if num_read := self._store.bring_back(layer, experts):
                    self._num_read += num_read
                    return True
        except DiskError as error:  # a request that needs these experts will say so
            log.warning("experts that were in memory before are not read back: %s", error)
            self._left = iter(())
        if self._num_read:
            seconds = self._clock() - self._started_s
            log.info("%d experts that were in memory before are there again, %.1f s", self._num_read, seconds)
            self._num_read = 0
        return False

    def save_when_due(self) -> None:
        """Saves every few minutes: what kills a process does not ask first."""
        if self._clock() - self._saved_s >= SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Replaces the file, or logs why it cannot; an empty store replaces nothing."""
        self._saved_s = self._clock()
        layers = {
            str(layer): experts for layer, experts in self._store.least_worth_first().items() if experts
        }
        if not layers:
            return
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps({"fingerprint": self._fingerprint, "layers": layers}))
            os.replace(part, self._path)
        except OSError as error:
            log.warning("which experts are in memory is not saved in %s: %s", self._path, error.strerror)

    def _read_file(self) -> dict[int, list[int]]:
        """Each layer's experts, the most worth last; none of another model or from a damaged file."""
        try:
            saved: Any = json.loads(self._path.read_text())
            if saved["fingerprint"] != self._fingerprint:
                return {}
            layers = {
                int(layer): [int(expert) for expert in saved["layers"][layer]] for layer in saved["layers"]
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("which experts were in memory cannot be read from %s: %s", self._path, error)
            return {}
        return {layer: experts for layer, experts in layers.items() if layer in self._store.layers}

    def _plan(self, layers: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, Sequence[int]]]:
        """What each layer holds best, as many as it has slots, some at a time."""
        for layer, experts in sorted(layers.items()):
            best = experts[-self._store.num_slots(layer) :]
            for first in range(0, len(best), EXPERTS_AT_ONCE):
                yield layer, best[first : first + EXPERTS_AT_ONCE]
