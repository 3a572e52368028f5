"""Two disks as one: who serves, what is refused, and that a failing side harms nobody."""

import heapq
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.rig.simulated_disk import SimulatedDisk
from config.errors import CheckpointError, DiskError
from streaming.disk.copies import find_copies
from streaming.disk.disk import DirectDisk, Disk
from streaming.disk.mirror import MirroredDisk
from streaming.files.floats import Bytes
from streaming.files.headers import read_header, read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import Kinds, separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk
from tests.streaming.test_store import assert_holds, raise_

NUM_EXPERTS = 10


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    rng = np.random.default_rng(0)
    write_safetensors(ours / "model-1.safetensors", stacked(rng, [1], NUM_EXPERTS))
    write_safetensors(ours / "model-2.safetensors", separate(rng, [2], NUM_EXPERTS))
    shutil.copytree(ours, theirs)
    return ours, theirs


def open_store(
    folders: Sequence[Path], *disks: Disk, timeout_s: float = 30.0, num_threads: int = 3
) -> tuple[ExpertIndex, ExpertStore]:
    """A store that reads from a disk for each folder, the checkpoint's own first."""
    index = ExpertIndex.from_entries(read_headers(folders[0]))
    mirrors = [find_copies(folders[0], folder, index.stamps) for folder in folders[1:]]
    disk = MirroredDisk(folders[0], mirrors, disks)
    return index, ExpertStore(
        index, NUM_EXPERTS, float_dtype=mx.float32, disk=disk, timeout_s=timeout_s, num_threads=num_threads
    )


def assert_all_arrive(index: ExpertIndex, store: ExpertStore) -> None:
    for layer in index.layers:
        slots = store.acquire(layer, range(NUM_EXPERTS)).tolist()
        for slot, expert in zip(slots, range(NUM_EXPERTS), strict=True):
            assert_holds(index, store, layer, slot, expert)
    store.check_integrity()
    store.close()


def test_both_sides_bring_the_bytes_of_the_file(folders: tuple[Path, Path]) -> None:
    sides = FaultyDisk(), FaultyDisk()
    index, store = open_store(folders, *sides)
    assert_all_arrive(index, store)
    assert min(disk.num_reads for disk in sides) > 0


def test_while_one_disk_is_slow_the_other_serves_nearly_all(folders: tuple[Path, Path]) -> None:
    enough = threading.Event()

    def slow(number: int, buffer: Bytes, offset: int) -> int | None:
        assert enough.wait(20)
        return None

    def fast(number: int, buffer: Bytes, offset: int) -> int | None:
        if number == 6:
            waiting.append(sides[0].num_reads)
            enough.set()
        return None

    sides, waiting = [FaultyDisk(slow), FaultyDisk(fast)], list[int]()
    index, store = open_store(folders, sides[0], sides[1])
    assert_all_arrive(index, store)
    assert waiting[0] <= 3, "no more than there are threads"


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), DiskError("replaced")])
def test_a_side_that_fails_is_dropped_and_nobody_notices(
    folders: tuple[Path, Path], bad: int, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    sides = [FaultyDisk(), FaultyDisk()]
    sides[bad].fault = lambda number, buffer, offset: raise_(error) if number > 3 else None
    # the other one is the slower, so that the bad one is asked a fourth time
    sides[1 - bad].fault = lambda number, buffer, offset: time.sleep(0.005)
    with caplog.at_level(logging.ERROR):
        index, store = open_store(folders, sides[0], sides[1])
        assert_all_arrive(index, store)
    [line] = [record.message for record in caplog.records]
    assert "is dropped" in line
    assert str(folders[bad]) in line.split(" is dropped")[0]
    assert store.statistics().failures == 0
    assert sides[bad].num_reads < 10, "a dropped side is left alone"


def test_a_copy_that_is_replaced_while_running_is_dropped(folders: tuple[Path, Path]) -> None:
    index, store = open_store(folders, DirectDisk(), DirectDisk())
    for name in ("model-1.safetensors", "model-2.safetensors"):
        with open(folders[1] / name, "r+b") as file:
            file.truncate(1000)
    assert_all_arrive(index, store)


def test_when_both_sides_fail_the_request_is_told(folders: tuple[Path, Path]) -> None:
    def fail(number: int, buffer: Bytes, offset: int) -> int | None:
        raise OSError(5, "Input/output error")

    _, store = open_store(folders, FaultyDisk(fail), FaultyDisk(fail))
    with pytest.raises(DiskError, match=r"layer 1, expert 0: .*Input/output error"):
        store.acquire(1, [0])
    store.check_integrity()
    store.close()


def test_a_read_that_hangs_is_asked_for_again_on_the_other_side_and_its_late_bytes_go_nowhere(
    folders: tuple[Path, Path],
) -> None:
    release, returned = threading.Event(), threading.Event()

    def hang_first(number: int, buffer: Bytes, offset: int) -> int | None:
        if number == 1:
            release.wait()
            buffer[:] = 0xAB
            threading.Timer(0.05, returned.set).start()
            return len(buffer)
        return None

    index, store = open_store(folders, FaultyDisk(), FaultyDisk(hang_first), timeout_s=0.2)
    slots = store.acquire(2, range(NUM_EXPERTS)).tolist()
    assert (store.statistics().num_timeouts, store.statistics().failures) == (1, 0)
    release.set()
    assert returned.wait(5)
    for slot, expert in zip(slots, range(NUM_EXPERTS), strict=True):
        assert_holds(index, store, 2, slot, expert)
    store.check_integrity()
    store.close()


Damage = Callable[[Path], object]


def _flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def _rename_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"up_proj", b"Up_proj", 1))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "model-2.safetensors: No such file or directory; copy the checkpoint there"),
        (_cut, "has .* bytes, .* copy the checkpoint again"),
        (_rename_tensor, "at byte 0; it is not the same checkpoint"),
        (_flip_last_byte, "it is not the same checkpoint"),
    ],
)
def test_what_is_not_the_same_checkpoint_is_refused(
    folders: tuple[Path, Path], damage: Damage, message: str
) -> None:
    damage(folders[1] / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_store(folders, DirectDisk(), DirectDisk())


def test_the_checkpoint_itself_and_a_folder_that_is_not_there_are_no_mirrors(
    folders: tuple[Path, Path],
) -> None:
    with pytest.raises(CheckpointError, match="itself; name a copy on another disk"):
        open_store((folders[0], folders[0]), DirectDisk(), DirectDisk())
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_store((folders[0], folders[0] / "none"), DirectDisk(), DirectDisk())


def test_a_mirror_on_the_same_file_system_is_pointed_out(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_store(folders, DirectDisk(), DirectDisk())[1].close()
    assert "nothing is gained" in caplog.text


def test_a_third_disk_serves_too_and_two_may_fail(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folders[0], tmp_path / "more")
    for _ in range(5):  # a disk that a busy machine has made look slow is asked for nothing
        caplog.clear()
        disks = [FaultyDisk(), FaultyDisk(), FaultyDisk()]
        index, store = open_store((*folders, tmp_path / "more"), *disks)
        store.acquire(1, [0])
        for disk in disks[1:]:
            disk.fault = lambda number, buffer, offset: raise_(OSError(5, "Input/output error"))
        assert_all_arrive(index, store)
        assert store.statistics().failures == 0
        if len(dropped_in(caplog)) == 2:
            break
    assert len(dropped_in(caplog)) == 2, "one line for each"


def dropped_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "is dropped" in record.message]


@pytest.mark.parametrize("hung", [1, 2])
def test_of_three_disks_one_that_hangs_drops_out(
    folders: tuple[Path, Path], tmp_path: Path, hung: int, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folders[0], tmp_path / "more")
    release = threading.Event()

    def hang(number: int, buffer: Bytes, offset: int) -> int | None:
        release.wait()
        return None

    for _ in range(5):  # a disk that a busy machine has made look slow is asked for nothing
        caplog.clear()
        disks = [FaultyDisk(), FaultyDisk(), FaultyDisk()]
        disks[hung].fault = hang
        index, store = open_store((*folders, tmp_path / "more"), *disks, timeout_s=0.3)
        slots = store.acquire(2, range(NUM_EXPERTS)).tolist()
        for slot, expert in zip(slots, range(NUM_EXPERTS), strict=True):
            assert_holds(index, store, 2, slot, expert)
        assert store.statistics().failures == 0
        release.set()
        store.close()
        release.clear()
        if dropped_in(caplog):
            break
    [line] = dropped_in(caplog)
    assert "a read did not come back in time" in line


RATES = [(12e6, 12e6), (18e6, 6e6), (6e6, 18e6), (12e6, 6e6, 3e6), (5e6, 5e6, 5e6, 15e6), (7e9, 7e9, 2.8e9)]


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("threads", [12, 32])
def test_disks_of_unequal_rate_together_reach_the_sum_of_their_rates(
    folders: tuple[Path, Path], rates: Sequence[float], threads: int
) -> None:
    """No clock runs: threads that always have a read, disks that serve in turn, in invented time."""
    now_s, nbytes, num_reads = 0.0, 1 << 17, 2000
    stamps = ExpertIndex.from_entries(read_headers(folders[0])).stamps
    mirrors = [find_copies(folders[0], folders[1], stamps)] * (len(rates) - 1)
    disk = MirroredDisk(folders[0], mirrors, [DirectDisk() for _ in rates], lambda: now_s)
    free_s, served = [0.0] * len(rates), [0] * len(rates)
    reads: list[tuple[float, int, int]] = []

    def ask(thread: int) -> None:
        side = disk.start(thread, nbytes)
        free_s[side] = max(free_s[side], now_s) + nbytes / rates[side]
        heapq.heappush(reads, (free_s[side], thread, side))

    for thread in range(threads):
        ask(thread)
    for _ in range(num_reads):
        now_s, thread, side = heapq.heappop(reads)
        disk.end(thread, side, arrived=True)
        served[side] += 1
        ask(thread)
    assert num_reads * nbytes >= 0.95 * sum(rates) * now_s
    for count, rate in zip(served, rates, strict=True):
        assert count / num_reads == pytest.approx(rate / sum(rates), abs=0.05)
    assert max(free_s) - min(free_s) <= 2.5 * nbytes / min(rates), "what is outstanding is done at once"


@pytest.mark.parametrize("rates", [(8e6, 8e6), (12e6, 4e6), (6e6, 6e6, 6e6)])
def test_one_expert_is_read_from_all_disks(tmp_path: Path, rates: Sequence[float]) -> None:
    folders = [tmp_path / str(number) for number in range(len(rates))]
    folders[0].mkdir()
    kinds: Kinds = {"weight": ("F32", (512, 512))}  # 3 MiB an expert
    write_safetensors(folders[0] / "model.safetensors", separate(np.random.default_rng(0), [1], 3, kinds))
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    disks = [SimulatedDisk(rate) for rate in rates]
    index = ExpertIndex.from_entries(read_headers(folders[0]))
    mirrors = [find_copies(folders[0], folder, index.stamps) for folder in folders[1:]]
    disk = MirroredDisk(folders[0], mirrors, disks)
    store = ExpertStore(index, 3, float_dtype=mx.float32, disk=disk, num_threads=8)
    store.acquire(1, [0])  # the rates are measured
    before = [disk.num_bytes for disk in disks]
    store.acquire(1, [1])
    store.close()
    served = [disk.num_bytes - bytes_before for disk, bytes_before in zip(disks, before, strict=True)]
    assert all(served)
    # A read is an eighth of the expert: no disk has more than one beside its share.
    for nbytes, rate in zip(served, rates, strict=True):
        assert nbytes <= sum(served) * (rate / sum(rates) + 1 / 6)


def _zero_tensor(path: Path, number: int) -> None:
    entry = read_header(path)[number]
    with open(path, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(entry.nbytes))


@pytest.mark.parametrize("number", [1, 4, 7, 8])
@pytest.mark.parametrize("name", ["model-1.safetensors", "model-2.safetensors"])
def test_each_tensor_is_sampled(folders: tuple[Path, Path], number: int, name: str) -> None:
    _zero_tensor(folders[1] / name, number)
    with pytest.raises(CheckpointError, match="it is not the same checkpoint"):
        find_copies(*folders, ExpertIndex.from_entries(read_headers(folders[0])).stamps)
