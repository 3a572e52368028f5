"""The start-up probe: what it reads, what it chooses; its timings are a simulated disk's."""

import threading
from pathlib import Path

import numpy as np
import pytest

from config.errors import DiskError
from streaming.disk.disk import aligned_buffer
from streaming.disk.probe import choose_depth, opened, probe_disk, read_bare
from streaming.disk.reads import buffer_bytes
from streaming.files.floats import Bytes
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.files.read_plan import plan_runs
from tests.streaming.expert_files import separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ExpertIndex:
    directory = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    write_safetensors(directory / "model-1.safetensors", stacked(rng, [1], 24))
    write_safetensors(directory / "model-2.safetensors", separate(rng, [2], 24))
    return ExpertIndex.from_entries(read_headers(directory))


class CountingDisk(FaultyDisk):
    def __init__(self) -> None:
        super().__init__(self._note)
        self.offsets: list[int] = []

    def _note(self, number: int, buffer: Bytes, offset: int) -> int | None:
        self.offsets.append(offset)
        return None


def test_no_expert_is_read_twice_and_every_depth_is_tried(index: ExpertIndex) -> None:
    disk = CountingDisk()
    probe = probe_disk(disk, index, limit_s=10)
    assert list(probe.rates) == [1, 2, 4, 8, 16, 32]
    pieces = 24 * 9 + 24  # a stacked expert is nine reads, a separate one is one
    assert 12 <= len(disk.offsets) <= pieces
    assert probe.bytes_per_s == probe.rates[probe.depth] >= 0.95 * max(probe.rates.values())


def test_it_reads_into_as_much_memory_as_it_may(index: ExpertIndex) -> None:
    addresses: list[int] = []

    def note(number: int, buffer: Bytes, offset: int) -> int | None:
        addresses.append(buffer.ctypes.data)
        return None

    def spread(room_bytes: int) -> int:
        addresses.clear()
        probe_disk(FaultyDisk(note), index, 1, room_bytes, limit_s=10)
        return max(addresses) - min(addresses)

    assert spread(2**17) > 2**16 > spread(0)


def test_it_stops_when_its_time_is_up(index: ExpertIndex) -> None:
    disk = CountingDisk()
    probe_disk(disk, index, limit_s=0)
    assert len(disk.offsets) == 12, "each depth twice, one read each time"


def test_depths_that_there_is_no_memory_for_are_not_tried(index: ExpertIndex) -> None:
    assert list(probe_disk(CountingDisk(), index, 8, limit_s=0.1).rates) == [1, 2, 4, 8]


def test_the_fewest_threads_that_come_near_to_the_best_rate_are_chosen() -> None:
    assert choose_depth({1: 9.0, 2: 15.0, 4: 16.5, 8: 17.0, 16: 17.1}) == 4
    assert choose_depth({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}) == 8


def test_a_thread_fills_its_buffer_from_start_to_end_and_again(index: ExpertIndex) -> None:
    addresses: list[int] = []

    def note(number: int, buffer: Bytes, offset: int) -> int | None:
        addresses.append(buffer.ctypes.data)
        return None

    runs = [run for expert in range(3) for run in plan_runs(index.pieces(2, expert))]
    most = max(run.nbytes for run in runs)
    buffer = aligned_buffer(2 * buffer_bytes(most))
    with opened(FaultyDisk(note), index) as files:
        rate = read_bare(files, iter(runs * 40), [buffer])
    assert rate.num_bytes == 40 * sum(run.nbytes for run in runs)
    start = buffer.ctypes.data
    assert addresses[0] == start < addresses[1], "the second read lies behind the first"
    assert addresses.count(start) > 1, "at the end it begins anew"
    assert all(address + most <= start + len(buffer) for address in addresses)


def test_a_disk_with_an_error_is_refused(index: ExpertIndex) -> None:
    def fail(number: int, buffer: Bytes, offset: int) -> int | None:
        raise OSError(5, "Input/output error")

    with pytest.raises(DiskError, match=r"model-[12]\.safetensors: Input/output error"):
        probe_disk(FaultyDisk(fail), index)


def test_a_disk_that_does_not_answer_is_refused_in_bounded_time(index: ExpertIndex) -> None:
    release = threading.Event()

    def hang(number: int, buffer: Bytes, offset: int) -> int | None:
        release.wait()
        return None

    try:
        with pytest.raises(DiskError, match=r"no answer in 0\.1 s"):
            probe_disk(FaultyDisk(hang), index, timeout_s=0.1)
    finally:
        release.set()


def test_a_file_replaced_before_the_probe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, stacked(np.random.default_rng(0), [0], 2))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    write_safetensors(tmp_path / "other", stacked(np.random.default_rng(1), [0], 2))
    (tmp_path / "other").replace(path)
    with pytest.raises(DiskError, match="was replaced or changed"):
        probe_disk(CountingDisk(), index)
