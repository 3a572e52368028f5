"""Saved prompts in one file: whole on another machine, or refused with nothing changed."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from config.errors import UsageError
from streaming.prefix.archive import ABOUT, Fingerprints, Moved, export_blocks, import_blocks
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, as_tokens, chain_key, root_key
from tests.streaming.prefix.prefix_blocks import FINGERPRINT, make_chain

PLENTY = 10**9
PORTABLE = bytes(range(1, 33))
HERE = Fingerprints(FINGERPRINT, PORTABLE)
THERE = Fingerprints(bytes(32), PORTABLE)


@pytest.fixture
def files(tmp_path: Path) -> BlockFiles:
    """Two conversations that begin alike, one of them pinned, and a block of another checkpoint."""
    files = BlockFiles(tmp_path / "here", FINGERPRINT, PLENTY)
    BlockFiles(tmp_path / "here", bytes(32), PLENTY).write(make_chain(1, seed=8)[0])
    for block in conversations():
        assert files.write(block)
    files.pin([block.name for block in make_chain(3)])
    return files


def conversations() -> list[Block]:
    chain = make_chain(3)
    branch = Block(chain[1].name.key, 8, as_tokens([1, 2]), np.arange(50, dtype=np.uint8))
    return [*chain, branch]


@pytest.fixture
def export(files: BlockFiles, tmp_path: Path) -> Path:
    target = tmp_path / "prompts.tar"
    export_blocks(files, HERE, target, only_pinned=False)
    return target


@pytest.fixture
def there(tmp_path: Path) -> BlockFiles:
    """Another machine, whose files of the checkpoint have other times."""
    return BlockFiles(tmp_path / "there", THERE.exact, PLENTY)


def payloads(files: BlockFiles, root: bytes) -> Iterator[bytes | None]:
    """What a prompt finds there, block by block from its start."""
    keys = {root_key(FINGERPRINT): root}
    for block in conversations():
        moved = Block(keys[block.parent], block.start, block.tokens, block.payload)
        keys[block.name.key] = chain_key(moved.parent, moved.tokens)
        found = files.read(moved.name)
        yield found.payload.tobytes() if found else None


def test_what_was_exported_is_found_on_another_machine(
    files: BlockFiles, export: Path, there: BlockFiles
) -> None:
    assert export.stat().st_mode & 0o077 == 0
    moved = import_blocks(there, THERE, export)
    assert (moved.num_blocks, moved.num_tokens, moved.num_known) == (4, 14, 0)
    found = list(payloads(there, root_key(THERE.exact)))
    assert found == [block.payload.tobytes() for block in conversations()]
    assert there.num_pinned == 3
    assert import_blocks(there, THERE, export).num_known == 4, "twice is no harm"
    assert len(files.list()) == 5, "the block of another checkpoint is left alone"


def test_only_what_is_pinned_is_exported_where_that_is_wanted(files: BlockFiles, tmp_path: Path) -> None:
    assert export_blocks(files, HERE, tmp_path / "pinned.tar", only_pinned=True).num_blocks == 3


def test_what_no_prompt_can_reach_is_left_out(files: BlockFiles, tmp_path: Path) -> None:
    (files.directory / make_chain(2)[1].name.file_name).unlink()
    assert export_blocks(files, HERE, tmp_path / "rest.tar", only_pinned=False).num_blocks == 1


def test_any_flipped_bit_or_cut_is_refused_and_changes_nothing(export: Path, there: BlockFiles) -> None:
    whole, rng = export.read_bytes(), np.random.default_rng(3)
    with tarfile.open(export) as archive:
        used = [range(m.offset_data, m.offset_data + m.size) for m in archive]
        headers = [range(m.offset, m.offset + 100) for m in archive]  # the name; padding means nothing
    places = np.concatenate([np.fromiter(part, int) for part in used + headers])
    end = used[-1].stop
    for number in range(300):
        damaged = bytearray(whole)
        if number % 3:
            damaged[int(rng.choice(places))] ^= 1 << int(rng.integers(0, 8))
        else:
            damaged = damaged[: int(rng.integers(0, end))]
        export.write_bytes(damaged)
        with pytest.raises(UsageError, match=export.name):
            import_blocks(there, THERE, export)
        assert not there.list()
    export.write_bytes(whole)
    assert import_blocks(there, THERE, export).num_blocks == 4


def test_an_export_of_another_checkpoint_is_refused(export: Path, tmp_path: Path) -> None:
    other = Fingerprints(bytes(31) + b"\1", bytes(32))
    with pytest.raises(UsageError, match="another checkpoint"):
        import_blocks(BlockFiles(tmp_path / "other", other.exact, PLENTY), other, export)


@pytest.mark.parametrize("content", [b"", b"no archive at all " * 99, json.dumps({}).encode()])
def test_a_file_that_is_no_export_is_refused(content: bytes, there: BlockFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match="no export of glmserve"):
        import_blocks(there, THERE, tmp_path / "file")
    with pytest.raises(UsageError, match="No such file"):
        import_blocks(there, THERE, tmp_path / "nowhere")


def test_an_archive_of_something_else_is_refused(there: BlockFiles, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(tmp_path / "notes", "notes")
    with pytest.raises(UsageError, match="does not begin"):
        import_blocks(there, THERE, tmp_path / "some.tar")


def test_an_export_of_another_format_is_refused(export: Path, there: BlockFiles) -> None:
    content = export.read_bytes()
    export.write_bytes(content.replace(b'{"format": 1', b'{"format": 2', 1))
    with pytest.raises(UsageError, match="another version"):
        import_blocks(there, THERE, export)
    with tarfile.open(export) as archive:
        assert archive.getnames()[0] == ABOUT


def test_an_export_that_does_not_fit_is_refused_with_both_sizes(export: Path, tmp_path: Path) -> None:
    small = BlockFiles(tmp_path / "small", THERE.exact, 2000)
    with pytest.raises(UsageError, match="--prefix-cache-size"):
        import_blocks(small, THERE, export)
    assert not small.list()


def test_nothing_is_written_over_and_nothing_half_is_left(
    files: BlockFiles, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="exists already"):
        export_blocks(files, HERE, export, only_pinned=False)
    with pytest.raises(UsageError, match="no saved prompts"):
        export_blocks(BlockFiles(tmp_path / "new", FINGERPRINT, PLENTY), HERE, tmp_path / "e", False)
    with pytest.raises(UsageError, match="cannot be written"):
        export_blocks(files, HERE, tmp_path / "no" / "folder", only_pinned=False)

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match="No space"):
        export_blocks(files, HERE, tmp_path / "full.tar", only_pinned=False)
    assert not list(tmp_path.glob("*.part"))
    assert isinstance(import_blocks(files, HERE, export), Moved)


def test_what_is_imported_does_not_drive_out_its_own_beginning(tmp_path: Path) -> None:
    whole = BlockFiles(tmp_path / "whole", FINGERPRINT, PLENTY)
    chain = make_chain(40)
    for block in chain:
        whole.write(block)
    export_blocks(whole, HERE, tmp_path / "prompts.tar", only_pinned=False)
    full = BlockFiles(tmp_path / "full", FINGERPRINT, chain[0].nbytes * 81 // 2)
    for block in [*make_chain(5, seed=9), *chain[:3]]:
        full.write(block)
    import_blocks(full, HERE, tmp_path / "prompts.tar")
    assert all(full.has(block.name) for block in chain)


def test_an_import_that_pinned_blocks_leave_no_room_for_is_refused(tmp_path: Path) -> None:
    whole = BlockFiles(tmp_path / "whole", FINGERPRINT, PLENTY)
    chain, others = make_chain(20), make_chain(20, seed=9)
    for block in chain:
        whole.write(block)
    export_blocks(whole, HERE, tmp_path / "prompts.tar", only_pinned=False)
    full = BlockFiles(tmp_path / "full", FINGERPRINT, chain[0].nbytes * 30)
    for block in others:
        full.write(block)
    full.pin([block.name for block in others])
    with pytest.raises(UsageError, match=r"has no room for .*: pinned blocks"):
        import_blocks(full, HERE, tmp_path / "prompts.tar")
    assert not any(full.has(block.name) for block in chain)
