"""What start-up says of a checkpoint's layout."""

from pathlib import Path

import numpy as np
import pytest

from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.files.layout import advise_aligning, measure_layout
from tests.streaming.expert_files import Kinds, Tensors, separate, stacked, write_safetensors


def make_kinds(rows: int, words: int, groups: int) -> Kinds:
    scales = ("BF16", (rows, groups))
    return {"weight": ("U32", (rows, words)), "scales": scales, "biases": scales}


LARGE, SMALL, UNEVEN = make_kinds(256, 512, 256), make_kinds(64, 64, 32), make_kinds(250, 500, 256)
PAGE = 4096


def make_index(folder: Path, tensors: Tensors, header_bytes: int) -> ExpertIndex:
    """The headers are so long, modulo a page."""
    path = folder / "model.safetensors"
    write_safetensors(path, tensors)
    length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    write_safetensors(path, tensors, (header_bytes - length) % PAGE)
    return ExpertIndex.from_entries(read_headers(folder))


@pytest.mark.parametrize(
    ("kinds", "is_stacked", "header_bytes", "num_reads", "share", "is_said"),
    [
        (LARGE, True, 0, 9, 1, True),
        (LARGE, True, 8, 9, 0.98, True),
        (LARGE, True, 13, 9, 0, True),
        (LARGE, False, 0, 1, 1, False),
        (LARGE, False, 13, 1, 0, True),
        (UNEVEN, True, 0, 9, 0, True),
        (SMALL, True, 13, 4, 0, False),
    ],
)
def test_a_layout_that_costs_is_said_with_the_command(
    tmp_path: Path, kinds: Kinds, is_stacked: bool, header_bytes: int, num_reads: int, share: float,
    is_said: bool,
) -> None:  # fmt: skip
    make = stacked if is_stacked else separate
    index = make_index(tmp_path, make(np.random.default_rng(0), [3, 4], 2, kinds), header_bytes)
    layout = measure_layout(index, PAGE)
    assert layout.num_reads == num_reads
    assert layout.straight_share == pytest.approx(share, abs=0.02)
    line = advise_aligning(index, tmp_path, PAGE)
    assert (line is not None) is is_said
    assert line is None or (f"glmserve align {tmp_path}" in line and "\n" not in line)
