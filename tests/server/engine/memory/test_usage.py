"""What is used of each line, where a buffer belongs to one now and to another later."""

from types import SimpleNamespace

import mlx.core as mx

from server.engine.memory.usage import MemoryUse


def test_freed_buffers_beyond_their_line_are_the_next_steps_workspace() -> None:
    store = SimpleNamespace(slot_bytes=0, reader_bytes=0, ring_bytes=0)
    limit = mx.set_cache_limit(10**9)
    mx.clear_cache()
    try:
        use = MemoryUse(store, 0, lambda: 0, lambda: 0, 10**7)  # type: ignore[arg-type]
        buffer = mx.zeros(10**7, mx.float32)
        mx.eval(buffer)
        del buffer
        mx.reset_peak_memory()
        lines = use.lines()
    finally:
        mx.set_cache_limit(limit)
        mx.clear_cache()
    assert lines["MLX buffer cache"] == 10**7
    assert 2.9e7 < lines["workspace"] < 3.2e7
