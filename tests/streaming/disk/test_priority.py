"""While somebody waits for reads, sweeps leave most of the disk to them; else they have all of it."""

import threading
from pathlib import Path

import pytest

from streaming.disk.reader import Reader
from streaming.disk.reads import RECENT_S, Precedence, Read, ReadClass
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp
from tests.streaming.faulty_disk import FaultyDisk
from tests.waiting import wait_until

BLOCK = 4096


def test_sweeps_pause_for_as_long_as_a_read_that_was_waited_for_is_recent() -> None:
    now = [10.0]
    precedence = Precedence(8, lambda: now[0])
    for _ in range(2):
        assert precedence.start(ReadClass.SWEEP)
    assert precedence.pause_s(ReadClass.SWEEP) == 0
    precedence.note(ReadClass.LOOKAHEAD)
    assert precedence.pause_s(ReadClass.SWEEP) == 0
    precedence.note(ReadClass.DEMAND)
    assert precedence.pause_s(ReadClass.SWEEP) == pytest.approx(RECENT_S)
    assert precedence.pause_s(ReadClass.DEMAND) == precedence.pause_s(ReadClass.LOOKAHEAD) == 0
    now[0] += RECENT_S / 2
    assert precedence.pause_s(ReadClass.SWEEP) == pytest.approx(RECENT_S / 2)
    precedence.end()
    assert precedence.pause_s(ReadClass.SWEEP) == 0
    assert precedence.start(ReadClass.SWEEP)
    now[0] += RECENT_S
    assert precedence.pause_s(ReadClass.SWEEP) == 0


class Slow:
    """A disk whose reads wait; how many of blocks from 10 on are under way at a time, those of a sweep."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.now, self.most, self.num_begun = 0, 0, 0
        self._lock = threading.Lock()
        self.disk = FaultyDisk(self._fault)

    def _fault(self, number: int, buffer: Bytes, offset: int) -> None:
        is_sweep = offset >= 10 * BLOCK
        with self._lock:
            self.num_begun += 1
            self.now += is_sweep
            self.most = max(self.most, self.now)
        self.let_go.wait(5)
        with self._lock:
            self.now -= is_sweep


@pytest.mark.parametrize(("comes_first", "most"), [(True, 2), (False, 8)])
def test_a_sweep_has_all_threads_unless_somebody_waited_just_now(
    tmp_path: Path, comes_first: bool, most: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(BLOCK * 40))
    slow = Slow()
    reader = Reader(slow.disk, {path: FileStamp.from_path(path)}, max_read_bytes=BLOCK, num_threads=8)

    def reads(blocks: range, read_class: ReadClass) -> list[Read]:
        return [Read(path, block * BLOCK, BLOCK, lambda raw: None, read_class) for block in blocks]

    slow.let_go.set()
    if comes_first:
        reader.wait(reader.submit(reads(range(1), ReadClass.DEMAND)))
    slow.let_go.clear()
    sweep = reader.submit(reads(range(10, 40), ReadClass.SWEEP))
    wait_until(lambda: slow.now >= most)
    demand = reader.submit(reads(range(4), ReadClass.DEMAND))
    if comes_first:
        wait_until(lambda: slow.num_begun >= 1 + 2 + 4)  # threads were left for it
    slow.let_go.set()
    reader.wait(demand)
    reader.wait(sweep)
    assert slow.most == most
    assert all(read.error is None for read in [*sweep.reads, *demand.reads])
    reader.close()
