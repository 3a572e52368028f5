"""Writes blocks behind the engine's back: a thread of low priority, a bounded queue, a daily allowance.

Owned by the prefix cache. The queue holds names, not bytes: a block that memory has given up before its turn
is not written, and counted. Nothing here ever makes the engine wait.
"""

import contextlib
import ctypes
import ctypes.util
import logging
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from config.sizes import format_size
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import BlockName
from streaming.prefix.block_memory import BlockMemory

DAY_S = 86_400.0
MAX_WAITING = 65_536
IDLE_WAIT_S = 60.0

# A block to write, a chain to mark as used, or a change that an administrator wants.
Work = BlockName | Sequence[BlockName] | Callable[[], object]

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class WriteAllowance:
    """Bytes that may be written: a day's worth at once, refilled evenly over the day. SSDs wear."""

    def __init__(
        self, bytes_per_day: int, already_written: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bytes_per_day, self._clock = bytes_per_day, clock
        self._left = float(max(0, bytes_per_day - already_written))
        self._at_s = clock()

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` may be written now; if so, they are taken off the allowance."""
        now = self._clock()
        self._left = min(self._bytes_per_day, self._left + (now - self._at_s) * self._bytes_per_day / DAY_S)
        self._at_s = now
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True


class BlockWriter:
    """The thread that writes."""

    def __init__(self, files: BlockFiles, memory: BlockMemory, bytes_per_day: int) -> None:
        since_ns = time.time_ns() - int(DAY_S * 1e9)
        recent = sum(file.nbytes for file in files.list() if file.written_ns > since_ns)
        self._files, self._memory = files, memory
        self._allowance = WriteAllowance(bytes_per_day, recent)
        self._is_spent = False
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._is_busy = self._is_closed = False
        self.num_written = self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="prefix-writer", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """At least as many as blocks that are still to be written."""
        return len(self._waiting)

    def write(self, names: Sequence[BlockName], chain: Sequence[BlockName]) -> None:
        """Queue blocks, parents first, and then mark the whole chain as used. Never blocks."""
        with self._changed:
            if len(self._waiting) + len(names) > MAX_WAITING:
                self.num_dropped += len(names)
                return
            self._waiting.extend(names)
            if chain:
                self._waiting.append(tuple(chain))
            self._changed.notify_all()

    def call(self, work: Callable[[], Result]) -> "Future[Result]":
        """Queue something else that only this thread may do with the files, and return what comes of it."""
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.append(partial(_settle, future, work))
            self._changed.notify_all()
        return future

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_busy, timeout_s)

    def forget(self) -> None:
        """Drop the blocks that wait; what somebody waits for is still done."""
        with self._changed:
            called = [item for item in self._waiting if callable(item)]
            self._waiting.clear()
            self._waiting.extend(called)

    def close(self, timeout_s: float) -> None:
        """Writes what waits, for at most `timeout_s`, then ends the thread."""
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        _lower_io_priority()
        while (item := self._next()) is not None:
            try:
                self._work(item)
            except Exception:  # the thread must outlive whatever one block holds; a block is only a copy
                log.exception("a block of the prefix cache was not written")

    def _next(self) -> Work | None:
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            self._is_busy = True
            return self._waiting.popleft()

    def _work(self, item: Work) -> None:
        if callable(item):
            item()
            return
        if not isinstance(item, BlockName):
            self._files.use(item)
            return
        if self._files.has(item):  # another server was quicker
            return
        block = self._memory.get(item.key)
        # In this order: what a directory that is left alone does not get is not taken off the allowance.
        may_try = self._files.is_writable
        if block and may_try and self._may_write(block.nbytes) and self._files.write(block):
            self.num_written += 1
        else:
            self.num_dropped += 1

    def _may_write(self, nbytes: int) -> bool:
        may = self._allowance.take(nbytes)
        if not may and not self._is_spent:
            log.warning(
                "prefix cache: --prefix-cache-writes is used up (%s written); blocks stay in memory only "
                "until it has refilled", format_size(self._files.bytes_written),
            )  # fmt: skip
        self._is_spent = not may
        return may


def _settle(future: "Future[Result]", work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # whoever waits hears of it
        future.set_exception(error)


def _lower_io_priority() -> None:
    """Let the disk serve everybody else first: Linux's idle class, macOS' utility tier (not run by us).

    Based on ioprio_set(2) and setiopolicy_np(3). Where it is refused, writes compete as others do.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            libc.setiopolicy_np(0, 1, 4)  # IOPOL_TYPE_DISK, IOPOL_SCOPE_THREAD, IOPOL_UTILITY
        elif number := {"x86_64": 251, "aarch64": 30}.get(platform.machine()):
            libc.syscall(number, 1, 0, 3 << 13)  # this thread, IOPRIO_CLASS_IDLE
