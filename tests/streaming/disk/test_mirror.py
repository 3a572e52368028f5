"""Two disks as one: who serves, what is refused, and that a failing side harms nobody."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from config.errors import CheckpointError, DiskError
from streaming.disk.disk import DirectDisk, Disk
from streaming.disk.mirror import MirroredDisk, find_copies
from streaming.files.floats import Bytes
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import separate, stacked, write_safetensors
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
    folders: tuple[Path, Path], first: Disk, second: Disk, timeout_s: float = 30.0, num_threads: int = 3
) -> tuple[ExpertIndex, ExpertStore]:
    index = ExpertIndex.from_entries(read_headers(folders[0]))
    copies = find_copies(*folders, index.stamps)
    disk = MirroredDisk(*folders, copies, first, second)
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
