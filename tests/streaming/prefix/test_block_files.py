"""Files of saved KV: whole or a miss, bounded, shared, and no reason to stop when the disk fails."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streaming.prefix import block_files
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, BlockName
from tests.streaming.prefix.prefix_blocks import FINGERPRINT, is_same, make_chain

PLENTY = 10**9


def open_files(directory: Path, max_bytes: int = PLENTY, fingerprint: bytes = FINGERPRINT) -> BlockFiles:
    return BlockFiles(directory, fingerprint, max_bytes)


def write_all(files: BlockFiles, chain: list[Block]) -> None:
    for block in chain:
        assert files.write(block)
    files.use(block.name for block in chain)


def held(files: BlockFiles, chain: list[Block]) -> list[bool]:
    return [files.has(block.name) for block in chain]


def test_blocks_come_back_as_they_were_also_to_another_server(tmp_path: Path) -> None:
    chain, files = make_chain(5), open_files(tmp_path / "deep" / "er")
    other = open_files(tmp_path / "deep" / "er")
    write_all(files, chain)
    assert all(is_same(files.read(block.name), block) for block in chain)
    assert all(is_same(other.read(block.name), block) for block in chain)
    assert (tmp_path / "deep" / "er").stat().st_mode & 0o077 == 0
    assert other.read(BlockName(bytes(32), 0)) is None
    assert other.num_damaged == other.num_errors == 0


def test_a_thousand_flipped_bits_and_cuts_are_a_thousand_misses(tmp_path: Path) -> None:
    [block] = make_chain(1, payload_bytes=3000)
    files, rng = open_files(tmp_path), np.random.default_rng(5)
    path = tmp_path / block.name.file_name
    assert files.write(block)
    whole = path.read_bytes()
    header = [8 * byte + bit for byte in range(140) for bit in (0, 5)]
    places = header + [int(place) for place in rng.integers(0, 8 * len(whole), 1000 - len(header))]
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged if number % 2 else whole[: place // 8])
        assert files.read(block.name) is None, f"bit {place} was not noticed"
        assert not path.exists(), "what is damaged is deleted"
    assert files.num_damaged == 1000
    for longer in (whole + b"\0", whole + whole):
        path.write_bytes(longer)
        assert files.read(block.name) is None
    path.write_bytes(whole)
    assert is_same(files.read(block.name), block), "the test itself writes whole files when it means to"


def test_a_file_under_another_name_is_a_miss(tmp_path: Path) -> None:
    one, two = make_chain(2)
    files = open_files(tmp_path)
    write_all(files, [one, two])
    os.replace(tmp_path / one.name.file_name, tmp_path / two.name.file_name)
    assert files.read(two.name) is None


def test_another_checkpoint_finds_nothing_of_ours(tmp_path: Path) -> None:
    [block] = make_chain(1)
    write_all(open_files(tmp_path), [block])
    assert open_files(tmp_path, fingerprint=bytes(32)).read(block.name) is None


def test_the_size_is_bounded_and_the_longest_unused_goes_first_ends_before_beginnings(tmp_path: Path) -> None:
    old, new = make_chain(10, seed=1), make_chain(10, seed=2)
    files = open_files(tmp_path, 16 * old[0].nbytes)
    write_all(files, old)
    time.sleep(0.01)
    write_all(files, new[:5])
    time.sleep(0.01)
    files.use(block.name for block in old[:3])
    time.sleep(0.01)
    write_all(files, new[5:])
    assert sum(file.nbytes for file in files.list()) <= files.max_bytes
    assert all(held(files, new[5:]))
    kept = held(files, old)
    assert kept == sorted(kept, reverse=True), "a parent outlives its children"
    assert kept[:3] == [True] * 3, "what was used lately stays"
    assert files.num_evicted == 20 - len(files.list())


def test_two_servers_share_the_bound(tmp_path: Path) -> None:
    limit = 32 * make_chain(1)[0].nbytes
    servers = [open_files(tmp_path, limit), open_files(tmp_path, limit)]
    for seed in range(60):
        write_all(servers[seed % 2], make_chain(2, seed))
    assert sum(file.nbytes for file in servers[0].list()) <= limit * (1 + block_files.ROOM)


def test_pinned_blocks_stay(tmp_path: Path) -> None:
    pinned = make_chain(3, seed=1)
    files = open_files(tmp_path, 8 * pinned[0].nbytes)
    write_all(files, pinned)
    assert files.pin([block.name for block in pinned]) == 3
    for seed in range(2, 20):
        write_all(files, make_chain(2, seed))
    assert all(held(files, pinned))
    assert files.pin([block.name for block in pinned], is_pinned=False) == 3
    for seed in range(20, 30):
        write_all(files, make_chain(2, seed))
    assert not any(held(files, pinned))


def test_pins_that_fill_the_directory_stop_the_writing_and_nothing_else(tmp_path: Path) -> None:
    pinned, [more] = make_chain(4, seed=1), make_chain(1, seed=2)
    files = open_files(tmp_path, 4 * pinned[0].nbytes + 10)
    write_all(files, pinned)
    files.pin(block.name for block in pinned)
    assert not files.write(more)
    assert all(is_same(files.read(block.name), block) for block in pinned)


def test_clearing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    files, chain = open_files(tmp_path), make_chain(3)
    (tmp_path / "notes.txt").write_text("mine")
    write_all(files, chain)
    files.pin(block.name for block in chain)
    assert files.clear() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_writer_left_that_was_killed_is_swept_up(tmp_path: Path) -> None:
    old, young = tmp_path / ".1-2.tmp", tmp_path / ".1-3.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    open_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [young.name], "a young one may be at work"


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_left_alone_and_then_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: int
) -> None:
    one, two = make_chain(2)
    files = open_files(tmp_path)
    write_all(files, [one])

    def refuse(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        assert not files.write(two)
    assert not files.is_writable
    assert not files.write(two), "it is not tried again at once"
    assert [os.strerror(fault) in record.message for record in caplog.records] == [True], "one line, once"
    assert is_same(files.read(one.name), one), "what is there is still used"
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(files, "_off_until", 0.0)
    assert files.write(two)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
def test_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, chain = open_files(small_disk), make_chain(20, payload_bytes=100_000)
    written = [files.write(block) for block in chain]
    assert written == sorted(written, reverse=True)
    assert 5 < sum(written) < 11
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "No space left" in caplog.records[0].message
    assert [is_same(files.read(block.name), block) for block in chain] == written


@pytest.mark.root
def test_a_directory_that_becomes_read_only(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, [one, two] = open_files(small_disk), make_chain(2)
    assert files.write(one)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert not files.write(two)
    files.use([one.name])
    assert is_same(files.read(one.name), one)
    assert "Read-only" in caplog.records[0].message
    assert is_same(open_files(small_disk).read(one.name), one), "it can also be opened so"
