"""Where measurements of MLX's memory begin. Called by the tests that compare bytes held before and after."""

import gc

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
