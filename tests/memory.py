"""Where measurements of MLX's memory begin. Called by the tests that compare bytes held before and after."""

import gc
import sys
import tracemalloc
from collections.abc import Callable

import mlx.core as mx


def start_measuring() -> int:
    """Bytes that arrays hold, from where the peak counts anew.

    Arrays of earlier tests that wait for the garbage collector, in a cycle or a traceback, are freed first:
    freed in the middle of a measurement, they would be taken off what it finds.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def peak_of(compute: Callable[[], object]) -> int:
    """The most bytes that arrays of MLX and NumPy and Python's objects take together while this is computed.

    Neither library counts the other's. So both peaks are added up between any two calls of functions, and the
    largest sum is the result.
    """
    most = 0

    def note(*_: object) -> None:
        nonlocal most
        in_mlx = max(mx.get_peak_memory(), mx.get_active_memory())
        most = max(most, in_mlx + tracemalloc.get_traced_memory()[1])
        mx.reset_peak_memory()
        tracemalloc.reset_peak()

    before = start_measuring()
    tracemalloc.start()
    sys.setprofile(note)
    try:
        compute()
    finally:
        sys.setprofile(None)
        tracemalloc.stop()
    return most - before
