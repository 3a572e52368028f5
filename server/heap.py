"""Memory of the HTTP process: the C library gives back what is freed, and Python looks for cycles rarely.

Where the library is not glibc, nothing is asked of it.
"""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

# Names of glibc's malloc.h.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
# Larger blocks are mapped one by one and go back at once; bodies and texts are.
MAPPED_BYTES = 2**18
# New objects before each look for cycles, and looks before those at older objects. With Python's own numbers
# a body of 15,000 calls had 299 of them, of up to 90 ms in which nothing else ran; so it has 4 of up to 9 ms.
LOOKS = (50_000, 20, 100)
# Each thread would have a heap of its own, which never shrinks below its last used block.
NUM_HEAPS = 2


def bound_heap() -> None:
    """Use few heaps, and none for large blocks. Call before threads are started."""
    mallopt = _function("mallopt")
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_ARENA_MAX, NUM_HEAPS)


def look_rarely() -> None:
    """Look for cycles rarely, and never among what is there now. Call once everything is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*LOOKS)


def trim_heap() -> None:
    """Give back what lies free between used blocks; takes some milliseconds."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None)
