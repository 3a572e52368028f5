"""A disk of fixed rate and latency behind the reader's seam, so that schedules can be compared without noise.

Reads are served one after the other in order of arrival; a read takes its bytes divided by the rate, and
`latency_s` passes between its arrival and the start of its service, overlapped with the service of others.
The ledger is kept in the disk's own time: a read that arrives while another is served starts when that one
ends, to the nanosecond, however late the thread wakes. Called by the reader's threads.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streaming.disk.disk import DirectDisk, DiskFile
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp

ALIGNMENT = 4096


@dataclass(frozen=True)
class Service:
    """One read as the disk served it; times are those of `time.monotonic`."""

    arrival_s: float
    start_s: float
    end_s: float
    nbytes: int


class SimulatedDisk:
    """`contents` brings the bytes, in no time of the disk's own; without it reads leave the buffer alone."""

    def __init__(
        self, bytes_per_s: float, latency_s: float = 0.0, contents: DirectDisk | None = None
    ) -> None:
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        self.services: list[Service] = []
        self.contents = contents
        self._lock = threading.Lock()

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        inner = self.contents.open(path, stamp) if self.contents else None
        return _SimulatedFile(self, inner)

    @property
    def busy_s(self) -> float:
        return sum(service.end_s - service.start_s for service in self.services)

    @property
    def num_bytes(self) -> int:
        return sum(service.nbytes for service in self.services)

    def idle_s(self, since_s: float = 0.0) -> float:
        """Time without service between the first service since then and the last."""
        served = [service for service in self.services if service.start_s >= since_s]
        return served[-1].end_s - served[0].start_s - sum(s.end_s - s.start_s for s in served)

    def serve(self, nbytes: int) -> Service:
        """Queues a read and returns when it starts and ends."""
        with self._lock:
            arrival = time.monotonic()
            free = self.services[-1].end_s if self.services else 0.0
            start = max(arrival + self.latency_s, free)
            service = Service(arrival, start, start + nbytes / self.bytes_per_s, nbytes)
            self.services.append(service)
            return service


class _SimulatedFile:
    may_repeat = False

    def __init__(self, disk: SimulatedDisk, inner: DiskFile | None) -> None:
        self.alignment = inner.alignment if inner else ALIGNMENT
        self._disk, self._inner = disk, inner

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        service = self._disk.serve(num_bytes := sum(map(len, buffers)))
        count = self._inner.read_into(buffers, offset) if self._inner else num_bytes
        time.sleep(max(0.0, service.end_s - time.monotonic()))
        return count

    def check(self) -> None:
        if self._inner:
            self._inner.check()

    def give_up(self, thread: int) -> bool:
        return False

    def close(self) -> None:
        if self._inner:
            self._inner.close()
