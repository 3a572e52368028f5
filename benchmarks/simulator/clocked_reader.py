"""The product's reader without its threads: queue, classes, precedence and batches are its own.

A read is taken up when the reader would have given it to a thread, and put down when the simulated disk has
served it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rig.simulated_disk import SimulatedDisk
from benchmarks.simulator.clock import Clock
from streaming.disk.reader import Reader, _Worker
from streaming.disk.reads import Batch, Read, ReadClass, Task, aligned_range, buffer_bytes
from streaming.files.headers import FileStamp


class ClockedReader(Reader):
    """As `Reader`; `counts_alignment`: reads take the time of whole blocks, as the wall clock's do.

    `wake_s`: what it takes to hand a read's end to whoever waits.
    """

    def __init__(
        self,
        clock: Clock,
        counts_alignment: bool,
        wake_s: float,
        disk: SimulatedDisk,
        files: Mapping[Path, FileStamp],
        **options: Any,
    ) -> None:
        assert disk.contents is not None, "experts are read, if in no time"
        self._clock, self._served_by, self._counts_alignment = clock, disk, counts_alignment
        self._wake_s = wake_s
        self._idle: list[_Worker] = []
        self._pumps_s = 0.0
        super().__init__(disk.contents, files, **options)

    def submit(self, reads: Sequence[Read]) -> Batch:
        """As the reader's own."""
        batch = super().submit(reads)
        self._pump()
        return batch

    def promote(self, batch: Batch, read_class: ReadClass) -> None:
        """As the reader's own."""
        super().promote(batch, read_class)
        self._pump()

    def cancel(self, batch: Batch) -> bool:
        """As the reader's own."""
        is_dropped = super().cancel(batch)
        self._pump()
        return is_dropped

    def wait(self, batch: Batch) -> None:
        """Lets time pass until every read of the batch has settled."""
        has_waited = batch.num_pending > 0
        while batch.num_pending:
            self._clock.step()
        if has_waited:
            self._clock.sleep(self._wake_s)
        batch.check(self._files)

    def close(self) -> None:
        """Drops what waits; what is under way ends in time that nobody sees."""
        with self._lock:
            self._drop(lambda task: True, "the reader was closed")
        self._idle.clear()
        self._close_files()

    def _start_worker(self) -> None:
        worker = _Worker(buffer_bytes(self._max_read_bytes))
        self._workers.append(worker)
        self._idle.append(worker)

    def _pump(self) -> None:
        """Takes up what may start now; comes back when what waits may."""
        while self._idle and self._pause_s() == 0:
            worker = self._idle.pop()
            with self._lock:
                task = self._take_up(worker)
            file = self._files[task.read.path]
            _, whole = aligned_range(file.alignment, task.read.offset, task.read.nbytes)
            service = self._served_by.serve(whole if self._counts_alignment else task.read.nbytes)
            self._clock.at(service.end_s, partial(self._end, worker, task))
        if self._idle and (pause_s := self._pause_s()) and self._clock.now() >= self._pumps_s:
            self._pumps_s = self._clock.now() + pause_s
            self._clock.at(self._pumps_s, self._pump)

    def _end(self, worker: _Worker, task: Task) -> None:
        if task.read.path not in self._files:
            return  # closed meanwhile
        error: Exception | None = None
        try:
            self._perform(task.read, worker)
        except Exception as caught:  # as in the reader's threads
            error = caught
        with self._lock:
            self._put_down(worker, task, error)
        self._idle.append(worker)
        self._pump()
