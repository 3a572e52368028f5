"""Items of recent responses, so that a client may refer to one by its id instead of sending it again.

`RecentItems` belongs to the service and to the event loop's thread; any thread may call `find`.
Its bytes are a line of the memory plan. Nothing outlives the process.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from config.plan import RECENT_ITEMS_BYTES

# A session in which nothing was said for so long is over, or sends its items itself.
KEEP_S = 3600.0
# What an entry takes beside its text: key, tuple, the bytes' head and the place in the table.
ENTRY_BYTES = 500


class RecentItems:
    """The latest items of each caller by their ids, as long as they fit and are not old."""

    def __init__(
        self, most_bytes: int = RECENT_ITEMS_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_bytes, self._clock = most_bytes, clock
        self._items: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def add(self, caller: str, item: dict[str, Any]) -> None:
        """Keep an item under its id; one that is larger than all room is not kept."""
        raw = json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._lock:
            self._drop((caller, item["id"]))
            if len(raw) + ENTRY_BYTES > self._most_bytes:
                return
            self._items[caller, item["id"]] = self._clock(), raw
            self.num_bytes += len(raw) + ENTRY_BYTES
            while self._is_too_much():
                self._drop(next(iter(self._items)))

    def find(self, caller: str, item_id: str) -> dict[str, Any] | None:
        """An item that this caller was given not long ago."""
        with self._lock:
            added_at, raw = self._items.get((caller, item_id), (0.0, b""))
        if not raw or self._clock() - added_at > KEEP_S:
            return None
        item: dict[str, Any] = json.loads(raw.decode("utf-8", "surrogatepass"))
        return item

    def _is_too_much(self) -> bool:
        oldest_at, _ = next(iter(self._items.values()))
        return self.num_bytes > self._most_bytes or self._clock() - oldest_at > KEEP_S

    def _drop(self, key: tuple[str, str]) -> None:
        _, raw = self._items.pop(key, (0.0, None))
        if raw is not None:
            self.num_bytes -= len(raw) + ENTRY_BYTES
