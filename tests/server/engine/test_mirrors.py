"""Which copies the engine reads from, and that it ends once one of them was found to be wrong."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from server.engine.memory.governor import Ungoverned
from server.engine.mirrors import VERDICTS_NAME, MirrorDiffersError, MirrorWatch, open_mirrors
from streaming.disk.comparison import Verdicts
from streaming.disk.copies import find_copies
from streaming.disk.disk import DirectDisk
from streaming.disk.mirror import MirroredDisk
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from tests.streaming.expert_files import separate, stacked, write_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_safetensors(folder / "model-1.safetensors", stacked(rng, [1], 4))
    write_safetensors(folder / "model-2.safetensors", separate(rng, [2], 4))
    for name in ("one", "two", "three"):
        shutil.copytree(folder, tmp_path / name)
    return folder


@pytest.mark.parametrize("bad", [["one"], ["two"], ["one", "three"], ["one", "two", "three"]])
def test_a_mirror_that_was_found_to_differ_is_not_used_at_the_next_start(
    folder: Path, tmp_path: Path, bad: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    index = ExpertIndex.from_entries(read_headers(folder))
    verdicts = Verdicts(tmp_path / VERDICTS_NAME)
    for name in bad:
        verdicts.note(find_copies(folder, tmp_path / name, index.stamps), is_equal=False)
    names = ["one", "two", "three"]
    disk, comparison = open_mirrors(folder, index, [tmp_path / name for name in names], tmp_path)
    used = [mirror.path.name for mirror in disk.mirrors] if isinstance(disk, MirroredDisk) else []
    assert used == [name for name in names if name not in bad]
    assert (comparison is None) == (not used)
    lines = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == len(bad)
    assert all("is not used: it differs" in line for line in lines)


def test_without_mirrors_there_is_nothing_to_compare(folder: Path) -> None:
    index = ExpertIndex.from_entries(read_headers(folder))
    disk, comparison = open_mirrors(folder, index, (), None)
    assert isinstance(disk, DirectDisk)
    assert comparison is None


def test_between_two_steps_the_engine_ends_once_a_difference_was_found(folder: Path, tmp_path: Path) -> None:
    index = ExpertIndex.from_entries(read_headers(folder))
    _, comparison = open_mirrors(folder, index, [tmp_path / "one", tmp_path / "one"], None)
    assert comparison is not None
    watch = MirrorWatch(Ungoverned(), comparison)
    assert (watch.govern(), watch.pause_s) == (False, 1.0)
    assert watch.measure() == {"mirror_compared": 0.0}
    comparison.found = tmp_path / "one"
    with pytest.raises(MirrorDiffersError, match="differs from the checkpoint"):
        watch.govern()
    comparison.found = None
    comparison.run()
    assert (watch.govern(), watch.pause_s) == (False, None)
    assert watch.measure() == {"mirror_compared": 1.0}
