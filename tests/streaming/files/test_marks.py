"""A checkpoint that changes under us is noticed, and one that is only touched is not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from config.errors import CheckpointChanged, DiskError
from streaming.disk.disk import DirectDisk
from streaming.files.headers import FileStamp
from streaming.files.marks import SAMPLE_BYTES, mark_checkpoint, refuse_changed

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / SHARD).write_bytes(bytes(range(256)) * 8192)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def overwrite(path: Path, offset: int, nbytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * nbytes)


def replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "its beginning": lambda folder: overwrite(folder / SHARD, 0, 8),
    "its end": lambda folder: overwrite(folder / SHARD, 256 * 8192 - 8, 8),
    "a tensor in it": lambda folder: overwrite(folder / SHARD, 300_000, 200_000),
    "cut off": lambda folder: os.truncate(folder / SHARD, 256 * 8191),
    "longer": lambda folder: overwrite(folder / SHARD, 256 * 8192, 1),
    "replaced": lambda folder: replace(folder / SHARD, bytes(256 * 8192)),
    "gone": lambda folder: (folder / SHARD).unlink(),
    "one more": lambda folder: (folder / "model-00003-of-00003.safetensors").write_bytes(b"x"),
    "the config": lambda folder: (folder / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("keeps_times", [False, True])
def test_a_change_is_refused_in_words(
    checkpoint: Path, change: Callable[[Path], object], keeps_times: bool
) -> None:
    marks, stat = mark_checkpoint(checkpoint), (checkpoint / SHARD).stat()
    change(checkpoint)
    if keeps_times and (checkpoint / SHARD).exists():
        os.utime(checkpoint / SHARD, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointChanged, match=r"was changed while the server ran: .*Restart the server"):
        refuse_changed(checkpoint, marks)


TOUCHES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "touched": lambda folder: os.utime(folder / SHARD),
    "touched long ago": lambda folder: os.utime(folder / "config.json", (1, 1)),
    "put back": lambda folder: replace(folder / SHARD, (folder / SHARD).read_bytes()),
    "something else": lambda folder: (folder / "notes.txt").write_text("other"),
    "other rights": lambda folder: (folder / SHARD).chmod(0o600),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_a_touch_does_no_harm(checkpoint: Path, touch: Callable[[Path], object]) -> None:
    marks = mark_checkpoint(checkpoint)
    touch(checkpoint)
    refuse_changed(checkpoint, marks)


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1, 10 * SAMPLE_BYTES - 1])
def test_small_files_are_read_whole(checkpoint: Path, size: int) -> None:
    path = checkpoint / "model.safetensors"
    for position in {0, size // 3, size - 1} if size else set():
        path.write_bytes(bytes(size))
        marks = mark_checkpoint(checkpoint)
        overwrite(path, position, 1)
        with pytest.raises(CheckpointChanged):
            refuse_changed(checkpoint, marks)


def test_no_folder_has_no_marks(tmp_path: Path) -> None:
    assert mark_checkpoint(tmp_path / "none") == {}


def test_an_open_file_may_be_touched_but_not_changed(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    file = DirectDisk().open(path, FileStamp.from_path(path))
    for when in (1, 2, 3):
        os.utime(path, (when, when))
        file.check()
    overwrite(path, 1000, 100_000)
    with pytest.raises(CheckpointChanged, match="was replaced or changed"):
        file.check()
    file.close()


def test_a_file_that_changed_before_it_was_opened_is_refused(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    stamp = FileStamp.from_path(path)
    overwrite(path, 1000, 100_000)
    with pytest.raises(DiskError, match="was replaced or changed"):
        DirectDisk().open(path, stamp)
