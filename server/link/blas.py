"""A fast BLAS for MLX's CPU backend on Linux.

The published CPU wheel carries the reference BLAS, which is about 50 times slower than OpenBLAS. A process
that is started anyway can be given the distribution's OpenBLAS by preloading it. Called when the engine
process is started.
"""

import ctypes.util
import logging
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LIBRARY = "libopenblas.so.0"
# OpenBLAS's threads look for work for 2^26 cycles before they sleep, on cores that the disk's threads and the
# rest of MLX want: of 36 s of two cores they took 11. The shortest time that it takes is 2^4 cycles.
SLEEP_AT_ONCE = {"OPENBLAS_THREAD_TIMEOUT": "4"}

log = logging.getLogger(__name__)


def with_fast_blas(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with OpenBLAS preloaded where MLX computes on the CPU and the library is there."""
    result = dict(environment)
    if not _uses_cpu_wheel():
        return result
    library = find_openblas()
    if library is None:
        log.warning(
            "OpenBLAS was not found, so matrix products on the CPU are about 50 times slower than they could "
            "be; install it (Debian, Ubuntu: apt install libopenblas0-pthread; Fedora: dnf install openblas)"
        )
        return result
    result["LD_PRELOAD"] = ":".join(filter(None, [result.get("LD_PRELOAD"), library]))
    return SLEEP_AT_ONCE | result


def find_openblas() -> str | None:
    """OpenBLAS as the loader finds it, else where Debian puts it."""
    if ctypes.util.find_library("openblas"):
        return LIBRARY
    known = Path(f"/usr/lib/{platform.machine()}-linux-gnu/{LIBRARY}")
    return str(known) if known.exists() else None


def _uses_cpu_wheel() -> bool:
    if sys.platform != "linux":
        return False
    try:
        distribution("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True
