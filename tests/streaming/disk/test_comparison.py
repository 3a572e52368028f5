"""A mirror is compared in full, once: what the samples miss is found, said in one line, and remembered."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from streaming.disk.comparison import PAUSES, Comparison, Verdicts
from streaming.disk.copies import Mirror, find_copies
from streaming.disk.disk import DirectDisk, DiskFile
from streaming.disk.mirror import MirroredDisk
from streaming.files.headers import FileStamp, read_header, read_headers
from streaming.files.index import ExpertIndex
from tests.streaming.expert_files import Kinds, separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk

# 128 KiB a tensor: samples of 4 KiB see a tenth.
KINDS: Kinds = {"weight": ("F32", (256, 128))}
NUM_EXPERTS = 3


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_safetensors(folder / "model-1.safetensors", stacked(rng, [1], NUM_EXPERTS, KINDS))
    write_safetensors(folder / "model-2.safetensors", separate(rng, [2], NUM_EXPERTS, KINDS))
    return folder


def flip(path: Path, tensor: int, at: int) -> None:
    """Flips one bit."""
    place = read_header(path)[tensor].offset + at
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def mirrored(ours: Path, *copies: Path) -> tuple[MirroredDisk, Sequence[Mirror]]:
    stamps = ExpertIndex.from_entries(read_headers(ours)).stamps
    mirrors = [find_copies(ours, copy, stamps) for copy in copies]
    return MirroredDisk(ours, mirrors, [DirectDisk() for _ in range(1 + len(copies))]), mirrors


@pytest.mark.parametrize(
    ("name", "tensor", "at"),
    [
        ("model-1.safetensors", 0, 5000),
        ("model-1.safetensors", 2, 200_000),
        ("model-2.safetensors", 5, 70_001),
    ],
)
def test_one_flipped_bit_is_found_and_the_mirror_is_dropped_with_one_line(
    ours: Path, tmp_path: Path, name: str, tensor: int, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ours, copy)
    flip(copy / name, tensor, at)
    disk, mirrors = unsampled(ours, copy)
    comparison = Comparison(disk, Verdicts(tmp_path / "verdicts"))
    assert not comparison.is_proven
    comparison.run()
    assert not comparison.is_proven
    assert disk.is_dropped(1)
    [line] = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert f"--mirror {copy} is dropped" in line
    assert name in line
    assert Verdicts(tmp_path / "verdicts").is_equal(mirrors[0]) is False


def unsampled(ours: Path, copy: Path) -> tuple[MirroredDisk, Sequence[Mirror]]:
    """A mirror whose samples all missed the bit."""
    stamps = ExpertIndex.from_entries(read_headers(ours)).stamps
    theirs = read_headers(copy)
    copies = {path: next(e.stamp for e in theirs.values() if e.path.name == path.name) for path in stamps}
    mirror = Mirror(ours, copy, copies)
    return MirroredDisk(ours, [mirror], [DirectDisk(), DirectDisk()]), [mirror]


def test_an_equal_mirror_is_compared_once_and_progress_is_shown(
    ours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.disk.comparison.PIECE_BYTES", 65_536)
    for name in ("copy", "more"):
        shutil.copytree(ours, tmp_path / name)
    disk, _ = mirrored(ours, tmp_path / "copy", tmp_path / "more")
    first = Comparison(disk, Verdicts(tmp_path / "verdicts"))
    assert first.share == 0
    with caplog.at_level(logging.INFO):
        first.run()
    assert (first.is_proven, first.share) == (True, 1.0)
    assert sum("are being compared" in record.message for record in caplog.records) >= 8
    assert sum("equal to the checkpoint in every byte" in record.message for record in caplog.records) == 2
    assert not disk.is_dropped(1)
    again = Comparison(disk, Verdicts(tmp_path / "verdicts"))
    assert (again.is_proven, again.share) == (True, 1.0)


def test_a_copy_that_was_changed_since_is_compared_again(ours: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ours, copy)
    Comparison(mirrored(ours, copy)[0], Verdicts(tmp_path / "verdicts")).run()
    (copy / "model-1.safetensors").touch()
    assert not Comparison(mirrored(ours, copy)[0], Verdicts(tmp_path / "verdicts")).is_proven


def test_while_experts_are_read_it_takes_a_twentieth_of_the_time(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    disk, _ = mirrored(ours, tmp_path / "copy")
    pauses: list[float] = []
    Comparison(disk, Verdicts(None), sleep=pauses.append).run()
    assert pauses == []
    disk.end(1, disk.start(1, 1, ours / "model-1.safetensors"), arrived=True)  # an expert was just read
    Comparison(disk, Verdicts(None), sleep=pauses.append).run()
    assert len(pauses) == 2
    assert PAUSES >= 19


@pytest.mark.parametrize("why", ["input/output error", "hang"])
def test_a_mirror_that_was_dropped_is_not_said_to_be_equal(ours: Path, tmp_path: Path, why: str) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    disk, _ = mirrored(ours, tmp_path / "copy")
    disk.drop(1, why)
    comparison = Comparison(disk, Verdicts(None))
    comparison.run()
    assert not comparison.is_proven


def test_an_error_on_the_way_proves_nothing(
    ours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    disk, _ = mirrored(ours, tmp_path / "copy")

    def fail(number: int, buffer: object, offset: int) -> int:
        raise OSError(5, "Input/output error")

    comparison = Comparison(disk, Verdicts(None), make_disk=lambda: FaultyDisk(fail))
    comparison.run()
    assert not comparison.is_proven
    assert "could not be compared in full" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "null"])
def test_a_damaged_record_of_verdicts_is_none(tmp_path: Path, ours: Path, text: str) -> None:
    (tmp_path / "verdicts").write_text(text)
    shutil.copytree(ours, tmp_path / "copy")
    _, [mirror] = mirrored(ours, tmp_path / "copy")
    assert Verdicts(tmp_path / "verdicts").is_equal(mirror) is None


@pytest.mark.parametrize("bad", [None, "model-1.safetensors", "model-2.safetensors"])
def test_only_what_was_compared_is_read_from_a_mirror(ours: Path, tmp_path: Path, bad: str | None) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ours, copy)
    if bad:
        flip(copy / bad, 1, 5000)
    disk, _ = unsampled(ours, copy)
    names = ["model-1.safetensors", "model-2.safetensors"]
    read: dict[str, set[int]] = {}

    def look(opened: Path) -> None:
        for name in names:
            read.setdefault(f"{name} in {opened.name}", sides_of(disk, ours / name))

    class Looking(DirectDisk):
        def open(self, path: Path, stamp: FileStamp) -> DiskFile:
            look(path)
            return super().open(path, stamp)

    Comparison(disk, Verdicts(None), make_disk=Looking).run()
    assert read["model-1.safetensors in model-1.safetensors"] == {0}
    assert read["model-2.safetensors in model-1.safetensors"] == {0}
    if bad == names[0]:
        assert "model-1.safetensors in model-2.safetensors" not in read
    else:
        assert read["model-1.safetensors in model-2.safetensors"] == {0, 1}
        assert read["model-2.safetensors in model-2.safetensors"] == {0}
    last = {0} if bad else {0, 1}
    assert [sides_of(disk, ours / name) for name in names] == [last, last]


def sides_of(disk: MirroredDisk, path: Path) -> set[int]:
    """The sides that reads of this file go to, when each has one to serve."""
    numbers: set[int] = set()

    for thread in range(4):
        numbers.add(disk.start(thread, 10**6, path))
    for side in disk._sides:
        side.reads.clear()
    return numbers


def test_while_a_mirror_is_doubted_a_failing_disk_is_an_error_and_no_wrong_byte(
    ours: Path, tmp_path: Path
) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    disk, _ = mirrored(ours, tmp_path / "copy")
    comparison = Comparison(disk, Verdicts(None))
    assert not disk.drop(0, "input/output error"), "our own side is kept: no other may be asked"
    assert sides_of(disk, ours / "model-1.safetensors") == {0}
    comparison.run()
    assert disk.drop(0, "input/output error")
    assert sides_of(disk, ours / "model-1.safetensors") == {1}
