"""A pool of threads that read byte ranges into buffers of their own.

Owns the open files, the threads and their buffers. The engine's thread submits reads and waits for them; a
reader's thread hands the bytes to the read's `deliver`, which must not keep them. It knows no experts and
no slots.

Bytes go straight into a read's targets where both lie alike (`scatter`), else by way of the thread's buffer.

A read that does not come back in time fails with DiskError, or is asked for again where there is another
disk; its thread is written off, buffer and all (quarantine), and another takes its place. If the read returns
after all, its bytes go nowhere, but for those that went straight to a target: the thread is inside until then
(`Read.enter`). Then it rejoins when there is room.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from config.errors import DiskError
from config.plan import reader_buffers
from streaming.disk.disk import Disk, DiskFile, aligned_buffer
from streaming.disk.reads import (
    Batch,
    Precedence,
    Read,
    ReadClass,
    ReadDropped,
    ReadStatistics,
    Task,
    aligned_range,
    buffer_bytes,
    perform,
)
from streaming.files.headers import FileStamp

NUM_THREADS = 8
TIMEOUT_S = 30.0


class _Worker:
    def __init__(self, num_bytes: int) -> None:
        self.buffer = aligned_buffer(num_bytes)
        self.task: Task | None = None
        self.thread = 0
        self.is_delivering = False
        self.is_quarantined = False
        self.num_device_bytes = 0  # read and not yet counted
        self.is_background = False  # what it reads counts for `Precedence`


class Reader:
    """Positional reads in parallel, the most urgent class first, first come first served within a class."""

    def __init__(
        self,
        disk: Disk,
        files: Mapping[Path, FileStamp],
        *,
        max_read_bytes: int,
        num_threads: int = NUM_THREADS,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._statistics = ReadStatistics()
        self._max_read_bytes = max_read_bytes
        self._num_threads = num_threads
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._queue: list[tuple[ReadClass, int, Task]] = []  # by class, then in order of arrival
        self._order = itertools.count()
        self._precedence = Precedence(num_threads)
        self._workers: list[_Worker] = []
        self._num_quarantined = 0
        self._num_outstanding = 0
        self._busy_since_s = 0.0
        self._is_closed = False
        self._files: dict[Path, DiskFile] = {}
        self._open_files(disk, files)
        for _ in range(num_threads):
            self._start_worker()

    @property
    def statistics(self) -> ReadStatistics:
        """The counts now."""
        with self._lock:
            since_s = time.monotonic() - self._busy_since_s if self._num_outstanding else 0.0
            return replace(self._statistics, busy_s=self._statistics.busy_s + since_s)

    @property
    def memory_bytes(self) -> int:
        """What the buffers take at most, those in quarantine too."""
        with self._lock:
            num_buffers = len(self._workers) + self._num_quarantined
        return num_buffers * buffer_bytes(self._max_read_bytes)

    def submit(self, reads: Sequence[Read]) -> Batch:
        """Queues the reads and returns at once."""
        batch = Batch(reads, self._lock)
        with self._lock:
            assert not self._is_closed, "a closed reader was asked to read"
            if self._num_outstanding == 0:
                self._busy_since_s = time.monotonic()
            self._num_outstanding += len(reads)
            for read in reads:
                assert read.nbytes <= self._max_read_bytes, "a read is larger than the buffers of the reader"
                self._push(Task(read, batch, next(self._order)))
            self._work.notify(len(reads))
        return batch

    def wait(self, batch: Batch) -> None:
        """Returns when every read of the batch has settled; after a failure the unstarted are dropped.

        Then looks whether the files are still those that were opened: else none of the batch is good.
        """
        with self._lock:
            while batch.num_pending:
                self._give_up_hung_reads()
                if batch.has_failed:
                    self._drop(lambda task: task.batch is batch, "dropped after another read had failed")
                if batch.num_pending:
                    batch.changed.wait(self._next_timeout_s())
        batch.check(self._files)

    def promote(self, batch: Batch, read_class: ReadClass) -> None:
        """Those of the batch that wait in the queue wait in this class from now on."""
        with self._lock:
            self._precedence.note(read_class)
            for read in batch.reads:
                read.read_class = read_class
            self._queue = [(task.read.read_class, order, task) for _, order, task in self._queue]
            heapq.heapify(self._queue)

    def cancel(self, batch: Batch) -> bool:
        """Drops the reads of the batch that were not started; whether there were any."""
        with self._lock:
            return self._drop(lambda task: task.batch is batch, "no longer wanted") > 0

    def close(self) -> None:
        """Ends the threads. The files stay open while a quarantined thread may still use one of them."""
        with self._lock:
            self._is_closed = True
            self._drop(lambda task: True, "the reader was closed")
            self._work.notify_all()
            self._work.wait_for(lambda: not self._workers, self._timeout_s)
            if not self._workers and not self._num_quarantined:
                self._close_files()

    # The reader's threads.

    def _start_worker(self) -> None:
        worker = _Worker(buffer_bytes(self._max_read_bytes))
        self._workers.append(worker)
        threading.Thread(target=self._run, args=(worker,), name="expert-reader", daemon=True).start()

    def _run(self, worker: _Worker) -> None:
        worker.thread = threading.get_ident()
        task = self._next(worker, None, None)
        while task is not None:
            error: Exception | None = None
            try:
                self._perform(task.read, worker)
            except Exception as caught:
                # The thread's end of the line: the error is told to the batch that waits for this read.
                error = caught
            task = self._next(worker, task, error)

    def _next(self, worker: _Worker, done: Task | None, error: Exception | None) -> Task | None:
        """Settles what the thread has done and gives it the next read; None when the thread has to end.

        One turn under the lock for both: with small pieces, taking turns is most of what a read costs.
        """
        with self._lock:
            if not self._put_down(worker, done, error):
                return None
            while not self._is_closed and (pause_s := self._pause_s()) != 0:
                self._work.wait(pause_s)
            if self._is_closed:
                self._workers.remove(worker)
                self._work.notify_all()
                return None
            return self._take_up(worker)

    def _perform(self, read: Read, worker: _Worker) -> None:
        file = self._files[read.path]
        start, num_bytes = aligned_range(file.alignment, read.offset, read.nbytes)

        def is_ours() -> bool:
            """Else it was settled, or is with another disk."""
            # Without the lock: a quarantine sets its flag first and looks at `is_delivering` then.
            worker.num_device_bytes += num_bytes
            worker.is_delivering = True
            return not worker.is_quarantined

        perform(read, file, worker.buffer[:num_bytes], start, is_ours)

    # Under the lock.

    def _put_down(self, worker: _Worker, done: Task | None, error: Exception | None) -> bool:
        """Settles what the thread has done; False where it was written off and there is no room for it."""
        worker.task, worker.is_delivering = None, False
        self._statistics.device_bytes += worker.num_device_bytes
        worker.num_device_bytes = 0
        if worker.is_quarantined:
            if not self._readmit(worker):
                return False
        elif done is not None:
            if error is None:
                self._statistics.num_reads += 1
                self._statistics.payload_bytes += done.read.nbytes
            self._settle(done, error)
        self._free(worker)
        return True

    def _take_up(self, worker: _Worker) -> Task:
        """The most urgent read, which may start now, is the thread's."""
        *_, task = heapq.heappop(self._queue)
        task.started_s = time.monotonic()
        worker.task = task
        worker.is_background = self._precedence.start(task.read.read_class)
        return task

    def _settle(self, task: Task, error: Exception | None) -> None:
        self._precedence.note(task.read.read_class)
        task.read.error = error
        task.read.targets = ()  # a read that is kept must not keep the memory
        task.batch.num_pending -= 1
        task.batch.has_failed |= error is not None
        self._num_outstanding -= 1
        if self._num_outstanding == 0:
            self._statistics.busy_s += time.monotonic() - self._busy_since_s
        if error is not None or task.batch.num_pending == 0:
            task.batch.changed.notify_all()

    def _pause_s(self) -> float | None:
        """How long the most urgent read waits before a thread may take it; None: there is none."""
        return self._precedence.pause_s(self._queue[0][0]) if self._queue else None

    def _free(self, worker: _Worker) -> None:
        """What the thread reads, or read, holds up nobody any more."""
        if worker.is_background:
            worker.is_background = False
            self._precedence.end()
            self._work.notify()

    def _push(self, task: Task) -> None:
        self._precedence.note(task.read.read_class)
        heapq.heappush(self._queue, (task.read.read_class, task.order, task))

    def _drop(self, is_dropped: Callable[[Task], bool], why: str) -> int:
        dropped = [task for *_, task in self._queue if is_dropped(task)]
        if not dropped:
            return 0
        self._queue = [entry for entry in self._queue if not is_dropped(entry[-1])]
        heapq.heapify(self._queue)
        for task in dropped:
            self._settle(task, ReadDropped(f"{task.read.path}: {why}"))
        return len(dropped)

    def _give_up_hung_reads(self) -> None:
        now_s = time.monotonic()
        for worker in list(self._workers):
            if worker.task is not None and now_s - worker.task.started_s >= self._timeout_s:
                self._quarantine(worker, worker.task)
        if not self._workers:
            self._drop(lambda task: True, f"the disk has not answered {self._num_quarantined} earlier reads")

    def _quarantine(self, worker: _Worker, task: Task) -> None:
        worker.is_quarantined = True
        self._free(worker)
        self._workers.remove(worker)
        self._num_quarantined += 1
        self._statistics.num_timeouts += 1
        if self._num_quarantined <= reader_buffers(self._num_threads) - self._num_threads:
            self._start_worker()
        read = task.read
        # Bytes that are being delivered could arrive a second time.
        if not worker.is_delivering and self._files[read.path].give_up(worker.thread):
            self._push(Task(read, task.batch, task.order))
            self._work.notify()
            return
        self._settle(
            task,
            DiskError(
                f"{read.path}: reading {read.nbytes} bytes at {read.offset}: "
                f"no answer in {self._timeout_s:g} s"
            ),
        )

    def _readmit(self, worker: _Worker) -> bool:
        """Whether a thread whose hung read came back may go on working."""
        self._num_quarantined -= 1
        if self._is_closed or len(self._workers) >= self._num_threads:
            return False
        worker.is_quarantined = False
        self._workers.append(worker)
        return True

    def _next_timeout_s(self) -> float:
        starts = [worker.task.started_s for worker in self._workers if worker.task is not None]
        return max(0.0, min(starts, default=time.monotonic()) + self._timeout_s - time.monotonic())

    def _open_files(self, disk: Disk, files: Mapping[Path, FileStamp]) -> None:
        try:
            for path, stamp in files.items():
                self._files[path] = disk.open(path, stamp)
        except DiskError:
            self._close_files()
            raise

    def _close_files(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
