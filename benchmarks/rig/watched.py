"""The server with an engine that notes what it holds whenever it holds more: for `benchmarks.ceiling`.

`python -m benchmarks.rig.watched WORDS` serves as `glmserve WORDS` does; the engine process, this module
again, appends to the file that BENCHMARK_WATCH names: one JSON object a line, the first before there is a
model.
"""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

INTERVAL_S = 0.02
GROWTH_BYTES = 250_000
PAGE = os.sysconf("SC_PAGE_SIZE")


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; `fordblks`: bytes that were freed and not given back to the system."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def work() -> int:
    # imported here because the HTTP process must not load MLX
    import mlx.core as mx

    from server.engine.worker import main as work_on

    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallocInfo

    def note(resident: int) -> str:
        held = {"rss": resident, "active": mx.get_active_memory(), "cache": mx.get_cache_memory()}
        return json.dumps(held | {"free": info().fordblks})

    path = Path(os.environ["BENCHMARK_WATCH"])
    threading.Thread(target=watch, args=(path, note), daemon=True).start()
    return work_on()


def watch(path: Path, note: Callable[[int], str]) -> None:
    largest = 0
    with path.open("a", buffering=1) as file:
        while True:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
            if resident > largest + GROWTH_BYTES:
                largest = resident
                file.write(note(resident) + "\n")
            time.sleep(INTERVAL_S)


def serve() -> int:
    import server.commands.serve
    from server.cli import main as serve_words
    from server.link.supervisor import EngineProcess

    server.commands.serve.EngineProcess = partial(EngineProcess, worker="benchmarks.rig.watched")  # type: ignore
    return serve_words(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1].isdigit() else serve())
