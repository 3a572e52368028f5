"""The reader alone: in which order it reads, and that handing out bytes holds up nobody's read."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streaming.disk.reader import Reader
from streaming.disk.reads import Read, ReadClass, ReadDropped
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp
from tests.streaming.faulty_disk import FaultyDisk

BLOCK = 4096
NUM_BLOCKS = 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file whose block i holds the byte i."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(NUM_BLOCKS)))
    return path


@contextmanager
def opened(path: Path, disk: FaultyDisk, num_threads: int) -> Iterator[Reader]:
    files = {path: FileStamp.from_path(path)}
    reader = Reader(disk, files, max_read_bytes=BLOCK, num_threads=num_threads, timeout_s=10)
    try:
        yield reader
    finally:
        reader.close()


def read_of(path: Path, block: int, deliver: Callable[[Bytes], None], read_class: ReadClass) -> Read:
    return Read(path, block * BLOCK, BLOCK, deliver, read_class)


def test_the_most_urgent_class_goes_first_also_when_it_was_changed_in_the_queue(path: Path) -> None:
    started, release, seen = threading.Event(), threading.Event(), list[int]()

    def hold_first(number: int, buffer: Bytes, offset: int) -> int | None:
        if number == 1:
            started.set()
            assert release.wait(10)
        return None

    def note(raw: Bytes) -> None:
        seen.append(int(raw[0]))

    with opened(path, FaultyDisk(hold_first), 1) as reader:
        batches = [reader.submit([read_of(path, 0, note, ReadClass.DEMAND)])]
        assert started.wait(10)
        for block, read_class in enumerate(
            (ReadClass.PREFIX, ReadClass.SWEEP, ReadClass.SWEEP, ReadClass.LOOKAHEAD, ReadClass.DEMAND), 1
        ):
            batches.append(reader.submit([read_of(path, block, note, read_class)]))
        reader.promote(batches[3], ReadClass.DEMAND)
        assert reader.cancel(batches[2])
        assert not reader.cancel(batches[2])
        release.set()
        for batch in batches:
            reader.wait(batch)
    assert seen == [0, 3, 5, 4, 1], "block 3 was promoted and came before 5; 2 was cancelled"
    assert isinstance(batches[2].reads[0].error, ReadDropped)


def test_reads_start_and_bytes_arrive_while_another_thread_hands_its_own_out(path: Path) -> None:
    """Not under the lock: a copy that takes long holds up one thread and nothing else."""
    is_copying, others_done, seen = threading.Event(), threading.Event(), list[int]()

    def slow(raw: Bytes) -> None:
        is_copying.set()
        assert others_done.wait(10)

    disk = FaultyDisk()
    with opened(path, disk, 2) as reader:
        first = reader.submit([read_of(path, 0, slow, ReadClass.DEMAND)])
        assert is_copying.wait(10)
        others = reader.submit(
            [
                read_of(path, block, lambda raw: seen.append(int(raw[0])), ReadClass.DEMAND)
                for block in range(1, NUM_BLOCKS)
            ]
        )
        reader.wait(others)
        assert first.num_pending == 1
        others_done.set()
        reader.wait(first)
    assert seen == list(range(1, NUM_BLOCKS))
    assert (disk.num_reads, reader.statistics.num_reads) == (NUM_BLOCKS, NUM_BLOCKS)
