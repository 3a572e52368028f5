"""What Apple's machines need to keep their speed. Nothing here does anything on another platform.

None of it was ever run by us: each function says whose report it rests on (collected for this project in
November 2026). The worker passes its events through `with_activity`; the backend calls `wire` after loading,
the governor under another plan; `pressure.py` asks for the `pressure_level`.
"""

import ctypes
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import mlx.core as mx

from config.sizes import format_size
from server.link.messages import Event, Progress, Token

DARWIN = "darwin"
# Of `pressure_level`; 2 is a warning, 4 is critical.
NORMAL_PRESSURE = 1
HOST_VM_INFO64 = 4
# A token of a slow disk takes two seconds.
WARM_S = 5.0
BEAT_S = 0.0005
WARM_SIZE = 256
# A prompt may go without a sign of life for minutes.
AWAKE_S = 900
CAFFEINATE = "/usr/bin/caffeinate"

log = logging.getLogger(__name__)

Send = Callable[[Event], None]


def wire(nbytes: int, platform: str = sys.platform) -> None:
    """Keeps all of MLX's buffers, `nbytes`, from being paged out; at most what Metal allows.

    Called only where a person asked for it: MLX's fault #3186 is a panic of the kernel ("prepare count
    underflow") that was seen with a wired limit and in none of ten runs without.

    Based on: MLX's documentation of `set_wired_limit` (macOS 15; above the system's limit it is an error),
    and gmlx, nunspark and WASTE, where an unwired trunk was read again from disk for every token (0.10
    against 0.38 tokens/s). What is left to the system is what Metal leaves it. Never run by us.
    """
    if platform != DARWIN:
        return
    limit = int(mx.device_info()["max_recommended_working_set_size"])
    if nbytes > limit:
        log.warning(
            "MLX's buffers take %s, of which macOS keeps only %s in memory: lower --ram-budget, or raise "
            "the limit with sudo sysctl iogpu.wired_limit_mb=%d",
            format_size(nbytes), format_size(limit), -(-nbytes // 2**20),
        )  # fmt: skip
    try:
        mx.set_wired_limit(min(nbytes, limit))
    except (RuntimeError, ValueError) as error:
        log.warning("macOS does not keep the model from being paged out: %s", error)


def pressure_level(platform: str = sys.platform) -> int:
    """The kernel's own verdict on memory: 1 normal, 2 warning, 4 critical.

    Based on: doc/vm/memorystatus_notify.md of XNU, which tells of these levels, and published output of
    `sysctl kern.memorystatus_vm_pressure_level` on machines with much and with little memory left (1 and 4).
    Never run by us.
    """
    if platform != DARWIN:
        return NORMAL_PRESSURE
    level, size = ctypes.c_int(NORMAL_PRESSURE), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    if ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, 0):
        return NORMAL_PRESSURE
    return level.value


class _PageCounts(ctypes.Structure):
    """`vm_statistics64` of mach/vm_statistics.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("free", "active", "inactive", "wired")),
        ("faults", ctypes.c_uint64 * 9),
        *((name, ctypes.c_uint32) for name in ("purgeable", "speculative")),
        ("traffic", ctypes.c_uint64 * 4),
        *((name, ctypes.c_uint32) for name in ("compressor", "throttled", "external", "internal")),
        ("uncompressed_in_compressor", ctypes.c_uint64),
    )


def uncompressed_and_compressed_bytes(platform: str = sys.platform) -> tuple[int, int] | None:
    """Returns what the kernel weighs against each other: pages neither wired nor compressed, and compressed.

    Based on: host_statistics64 and vm_statistics.h of XNU, whose free pages include speculative ones. None on
    other platforms and where the kernel does not answer. Never run by us.
    """
    if platform != DARWIN:
        return None
    counts = _PageCounts()
    size = ctypes.c_uint32(ctypes.sizeof(counts) // 4)
    system = ctypes.CDLL(None)
    if system.host_statistics64(
        system.mach_host_self(), HOST_VM_INFO64, ctypes.byref(counts), ctypes.byref(size)
    ):
        return None
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    uncompressed = counts.free + counts.active + counts.inactive
    return uncompressed * page_bytes, counts.compressor * page_bytes


def with_activity(send: Send, platform: str = sys.platform) -> Send:
    """`send`, telling on the way that the machine is at work; on other platforms `send` itself."""
    if platform != DARWIN:
        return send
    warm, awake = KeepWarm(make_heater), KeepAwake()

    def passing(event: Event) -> None:
        if isinstance(event, Token):
            warm.touch()
        if isinstance(event, Token | Progress):
            awake.touch()
        send(event)

    return passing


def make_heater() -> Callable[[], None]:
    """A small product on a stream of the calling thread's own."""
    stream = mx.new_stream(mx.default_device())
    with mx.stream(stream):
        matrix = mx.ones((WARM_SIZE, WARM_SIZE))
        mx.eval(matrix)

    def heat() -> None:
        with mx.stream(stream):
            mx.eval(matrix @ matrix)

    return heat


class KeepWarm:
    """Gives the GPU a little to do while tokens come, so that its clock does not sag between layers.

    Based on: gmlx, a 256 x 256 product every 0.5 ms on another stream: 45 % more tokens a second with GLM-5.2
    on an M5 Max, for 0.1 W; oMLX saw the clock drop after 2 ms of rest. Never run by us.
    """

    def __init__(self, make_heat: Callable[[], Callable[[], None]], warm_s: float = WARM_S) -> None:
        self._make_heat, self._warm_s = make_heat, warm_s
        self._until_s = 0.0
        self._is_wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def touch(self) -> None:
        """A token was made; another is likely."""
        self._until_s = time.monotonic() + self._warm_s
        self._is_wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="keep-warm", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        heat = self._make_heat()
        while self._is_wanted.wait():
            heat()
            time.sleep(BEAT_S)
            if time.monotonic() > self._until_s:
                self._is_wanted.clear()


class KeepAwake:
    """No idle sleep while requests run.

    Based on: caffeinate(8); -i prevents idle sleep, -t ends it by itself, -w ends it with this process. Never
    run by us.
    """

    def __init__(self) -> None:
        self._renew_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def touch(self) -> None:
        """Something moved."""
        if (now_s := time.monotonic()) < self._renew_s:
            return
        self._renew_s = now_s + AWAKE_S / 2
        try:
            before, self._process = self._process, _spawn_caffeinate()
            if before is not None:
                before.terminate()
                before.wait()
        except OSError as error:
            log.warning("the machine may fall asleep while requests run: %s", error)


def _spawn_caffeinate() -> "subprocess.Popen[bytes]":
    """Starts it by posix_spawn: a fork would copy the page tables of 100 GB.

    Python does so with a full path and without closing descriptors, of which it lets none be inherited.
    """
    return subprocess.Popen([CAFFEINATE, "-i", "-t", str(AWAKE_S), "-w", str(os.getpid())], close_fds=False)
