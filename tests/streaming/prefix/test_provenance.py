"""Nothing that was computed with a mirror not yet proven is served by another process."""

from pathlib import Path

import pytest

from streaming.prefix.block_files import BlockFiles
from streaming.prefix.provenance import Provenance
from tests.streaming.prefix.prefix_blocks import FINGERPRINT, make_chain

PLENTY = 10**9


@pytest.mark.parametrize("restart_is_proven", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_blocks_of_an_unproven_time_end_with_their_process(
    tmp_path: Path, restart_is_proven: bool, seed: int
) -> None:
    proven: list[bool] = []
    files = BlockFiles(tmp_path, Provenance(FINGERPRINT, lambda: bool(proven)), PLENTY)
    early, late = make_chain(2, seed=seed)
    files.write(early)
    assert files.read(early.name) is not None, "in the same process it is as good as what is computed now"
    proven.append(True)
    files.write(late)
    after = BlockFiles(tmp_path, Provenance(FINGERPRINT, lambda: restart_is_proven), PLENTY)
    assert after.read(early.name) is None
    assert after.read(late.name) is not None


def test_what_was_saved_without_mirrors_is_used_with_them(tmp_path: Path) -> None:
    [block] = make_chain(1)
    BlockFiles(tmp_path, FINGERPRINT, PLENTY).write(block)
    files = BlockFiles(tmp_path, Provenance(FINGERPRINT, lambda: False), PLENTY)
    assert files.read(block.name) is not None
