"""The thread that writes saved KV: in order, within its allowance, and never in the way."""

import logging
import threading
from pathlib import Path

import pytest

from streaming.prefix import block_writer
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block
from streaming.prefix.block_memory import BlockMemory
from streaming.prefix.block_writer import DAY_S, BlockWriter, WriteAllowance
from tests.streaming.prefix.prefix_blocks import FINGERPRINT, make_chain

PLENTY = 10**9


def fill(memory: BlockMemory, chain: list[Block]) -> None:
    for block in chain:
        memory.put(block.name.key, block)


def test_memory_is_bounded_and_gives_up_the_ends_of_old_conversations() -> None:
    old, new = make_chain(6, seed=1), make_chain(5, seed=2)
    memory = BlockMemory(8 * old[0].nbytes)
    fill(memory, old)
    memory.use(block.name.key for block in old)
    fill(memory, new)
    memory.check_integrity()
    kept = [memory.get(block.name.key) is not None for block in old]
    assert kept == [True, True, True, False, False, False]
    assert len(memory) == 8


def test_a_block_that_fits_nowhere_is_not_kept() -> None:
    memory, [block] = BlockMemory(10), make_chain(1)
    memory.put(block.name.key, block)
    assert memory.nbytes == 0


def test_what_is_queued_is_written_and_marked_as_used_together(tmp_path: Path) -> None:
    files, memory, chain = BlockFiles(tmp_path, FINGERPRINT, PLENTY), BlockMemory(PLENTY), make_chain(4)
    fill(memory, chain)
    writer = BlockWriter(files, memory, PLENTY)
    names = [block.name for block in chain]
    writer.write(names[:3], names[:3])
    writer.write(names[3:], names)
    assert writer.flush(20)
    assert len({file.used_ns for file in files.list()}) == 1
    writer.write(names, names)
    writer.close(20)
    assert writer.num_written == 4, "what is there already is not written again"


def test_blocks_that_memory_gave_up_are_counted_and_not_written(tmp_path: Path) -> None:
    files, memory, chain = BlockFiles(tmp_path, FINGERPRINT, PLENTY), BlockMemory(PLENTY), make_chain(2)
    writer = BlockWriter(files, memory, PLENTY)
    writer.write([block.name for block in chain], [])
    writer.close(20)
    assert (writer.num_dropped, writer.num_written) == (2, 0)


def test_a_queue_that_is_full_drops_and_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, memory, chain = BlockFiles(tmp_path, FINGERPRINT, PLENTY), BlockMemory(PLENTY), make_chain(6)
    fill(memory, chain)
    gate = threading.Event()
    write = files.write
    monkeypatch.setattr(files, "write", lambda block: gate.wait(20) and write(block))
    monkeypatch.setattr(block_writer, "MAX_WAITING", 3)
    writer = BlockWriter(files, memory, PLENTY)
    for block in chain:
        writer.write([block.name], [])
    assert not writer.flush(0.01)
    gate.set()
    writer.close(20)
    assert writer.num_written + writer.num_dropped == 6
    assert 3 <= writer.num_written <= 4


def test_the_allowance_is_a_day_at_once_and_refills_evenly() -> None:
    now = [0.0]
    allowance = WriteAllowance(1000, 400, lambda: now[0])
    assert allowance.take(600)
    assert not allowance.take(1)
    now[0] = DAY_S / 4
    assert allowance.take(250)
    assert not allowance.take(1)
    now[0] = 100 * DAY_S
    assert allowance.take(1000)
    assert not allowance.take(1)


def test_writes_stop_at_the_allowance_and_a_restart_does_not_renew_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # a server that ran in this process may have set another
    memory, chain = BlockMemory(PLENTY), make_chain(10)
    fill(memory, chain)
    for _ in range(2):
        files = BlockFiles(tmp_path, FINGERPRINT, PLENTY)
        writer = BlockWriter(files, memory, 4 * chain[0].nbytes)
        writer.write([block.name for block in chain], [])
        writer.close(20)
        assert len(files.list()) == 4
    assert ["--prefix-cache-writes" in record.message for record in caplog.records] == [True, True]


def test_what_the_disk_refused_is_not_taken_off_the_allowance(tmp_path: Path) -> None:
    files, memory, chain = BlockFiles(tmp_path, FINGERPRINT, PLENTY), BlockMemory(PLENTY), make_chain(10)
    fill(memory, chain)
    files._off_until = float("inf")
    writer = BlockWriter(files, memory, 4 * chain[0].nbytes)
    names = [block.name for block in chain]
    writer.write(names, [])
    assert writer.flush(20)
    files._off_until = 0.0
    writer.write(names, [])
    writer.close(20)
    assert writer.num_written == 4
