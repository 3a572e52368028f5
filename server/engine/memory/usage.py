"""What the lines of the memory plan are used for, as far as it can be measured. Runs on the engine's thread.

Each figure is the largest seen so far, under the name of its line; that of the experts is what their banks
take now, because they may shrink. MLX knows how much it holds, and the most
that it held since it was asked last; what of that is neither trunk nor slots nor ring nor a sequence's cache
is workspace, with the rows of a sweep among it. What is resident beyond that most, the reader's buffers and
saved prompts is Python with its libraries, of both processes: the engine's parent serves HTTP. (That most,
because between two measurements no more than that was held.)
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from streaming.store import ExpertStore


class MemoryUse:
    """Measures when asked; what sequences' caches and saved prompts take is asked for then.

    Of the buffers that MLX has freed and keeps, `freed_bytes` have a line. The others will be the next
    step's workspace, and count there.
    """

    def __init__(
        self,
        store: ExpertStore,
        trunk_bytes: int,
        cache_bytes: Callable[[], int],
        saved_bytes: Callable[[], int],
        freed_bytes: int,
    ) -> None:
        self._store, self._trunk_bytes, self._freed_bytes = store, trunk_bytes, freed_bytes
        self._cache_bytes, self._saved_bytes = cache_bytes, saved_bytes
        self._largest: dict[str, int] = {}
        self._kv_before = self._slots_before = 0
        mx.reset_peak_memory()  # the checkpoint's tensors were cast on their way in

    def lines(self) -> dict[str, int]:
        for name, nbytes in self._now().items():
            self._largest[name] = max(nbytes, self._largest.get(name, 0))
        self._largest["experts"] = self._slots_before
        return dict(self._largest)

    def _now(self) -> dict[str, int]:
        trunk, slots, kv = self._trunk_bytes, self._store.slot_bytes, self._cache_bytes()
        buffers, freed = self._store.reader_bytes, mx.get_cache_memory()
        ring = self._store.ring_bytes
        lines = {"trunk": trunk, "experts": slots, "KV cache": kv, "reader buffers": buffers}
        lines["sweep ring"] = ring
        lines["MLX buffer cache"] = min(freed, self._freed_bytes)
        peak = mx.get_peak_memory()
        slots_then = max(slots, self._slots_before)
        lines["workspace"] = max(
            freed - lines["MLX buffer cache"], peak - trunk - slots_then - ring - max(kv, self._kv_before)
        )
        self._kv_before, self._slots_before = kv, slots
        mx.reset_peak_memory()
        if resident := _resident_bytes():
            others = max(mx.get_active_memory() + freed, peak) + buffers + self._saved_bytes()
            lines["Python and libraries"] = max(0, resident - others)
        return lines


def _resident_bytes() -> int:
    """Of this process and its parent; 0 where /proc does not tell."""
    total = 0
    for pid in (os.getpid(), os.getppid()):
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total
