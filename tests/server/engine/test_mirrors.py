"""Which copies the engine reads from."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from server.engine.mirrors import VERDICTS_NAME, open_mirrors
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
