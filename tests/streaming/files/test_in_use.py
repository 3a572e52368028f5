"""A folder is shared by servers, and a command that rewrites it has it alone."""

from pathlib import Path

import pytest

from config.errors import CheckpointError
from streaming.files.in_use import shared_use


def test_a_folder_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"),
        shared_use(tmp_path),
    ):
        pass
