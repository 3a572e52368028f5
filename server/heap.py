"""Has the C library give back what is freed, in the HTTP process. Where it is not glibc, nothing is done."""

import ctypes
from collections.abc import Callable
from typing import Any

# Names of glibc's malloc.h.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
# Larger blocks are mapped one by one and go back at once; bodies and texts are.
MAPPED_BYTES = 2**18
# Each thread would have a heap of its own, which never shrinks below its last used block.
NUM_HEAPS = 2


def bound_heap() -> None:
    """Use few heaps, and none for large blocks. Call before threads are started."""
    mallopt = _function("mallopt")
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_ARENA_MAX, NUM_HEAPS)


def trim_heap() -> None:
    """Give back what lies free between used blocks; takes some milliseconds."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None)
