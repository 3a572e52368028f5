"""Reads of whole aligned blocks, as a disk without page cache wants them.

Functions without state, used by the reader's threads and by the probe, which must read as they do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from config.errors import DiskError
from streaming.disk.disk import MAX_ALIGNMENT, DiskFile
from streaming.disk.reads import Read, Target
from streaming.files.floats import Bytes


class Scatter(NamedTuple):
    """What a read fills, one after the other, and what is copied then: from the second into the first."""

    filled: list[Bytes]
    copies: list[tuple[Bytes, Bytes]]
    is_direct: bool  # some of `filled` is memory of targets


def buffer_bytes(max_read_bytes: int) -> int:
    """One thread's buffer: room for the largest read wherever it starts."""
    return -(-max_read_bytes // MAX_ALIGNMENT) * MAX_ALIGNMENT + 2 * MAX_ALIGNMENT


def aligned_range(alignment: int, offset: int, nbytes: int) -> tuple[int, int]:
    """Start and length of the aligned read that covers `nbytes` at `offset`."""
    start = offset // alignment * alignment
    return start, -(-(offset - start + nbytes) // alignment) * alignment


def perform(read: Read, file: DiskFile, buffer: Bytes, start: int, is_wanted: Callable[[], bool]) -> None:
    """Reads what `buffer` holds from `start` on and puts what the read wants of it where it belongs.

    `is_wanted` is asked once the bytes are there. DiskError says what could not be read.
    """
    lead = read.offset - start
    # A hung read that comes back when another brought the bytes would write over who lies there then.
    filled, copies, is_inside = scatter(
        buffer, lead, read.targets, None if file.may_repeat else file.alignment
    )
    if is_inside and not read.enter():
        return  # nobody wants it any more
    try:
        read_fully(file, filled, start, lead + read.nbytes)
        if is_wanted() and (is_inside or read.enter()):
            is_inside = True
            for into, what in copies:
                np.copyto(into, what)
            read.deliver(buffer[lead : lead + read.nbytes])
    except OSError as error:
        raise DiskError(
            f"{read.path}: reading {read.nbytes} bytes at {read.offset}: {error.strerror or error}"
        ) from error
    finally:
        if is_inside:
            read.leave()


def scatter(buffer: Bytes, lead: int, targets: Sequence[Target], alignment: int | None) -> Scatter:
    """How an aligned read that starts `lead` bytes before what is wanted goes into its targets.

    Of each, whole blocks that lie in memory as they lie on disk are read straight into it; the others come by
    way of their places in the buffer, and so does everything where `alignment` is None.
    """
    filled: list[Bytes] = []
    copies: list[tuple[Bytes, Bytes]] = []
    done = 0
    for target in targets:
        first, memory = lead + target.at, target.memory
        last = first + len(memory)
        if not alignment or (target.address - first) % alignment or last - first < 2 * alignment:
            copies.append((memory, buffer[first:last]))
            continue
        start, stop = -(-first // alignment) * alignment, last // alignment * alignment
        if done < start:
            filled.append(buffer[done:start])
        filled.append(memory[start - first : stop - first])
        done = stop
        if first < start:
            copies.append((memory[: start - first], buffer[first:start]))
        if stop < last:
            copies.append((memory[stop - first :], buffer[stop:last]))
    if done < len(buffer):
        filled.append(buffer[done:])
    return Scatter(filled, copies, done > 0)


def read_fully(file: DiskFile, buffers: Sequence[Bytes], offset: int, num_needed: int) -> None:
    """Reads until `num_needed` bytes are there, going on after short reads from the last aligned byte."""
    done = 0
    while done < num_needed:
        try:
            count = file.read_into(_behind(buffers, done) if done else buffers, offset + done)
        except InterruptedError:
            continue
        if done + count >= num_needed:
            return
        resume = (done + count) // file.alignment * file.alignment
        if resume <= done:
            raise OSError(f"the file ends {num_needed - done - count} bytes early")
        done = resume


def _behind(buffers: Sequence[Bytes], num_bytes: int) -> list[Bytes]:
    """What is left of the buffers behind so many bytes."""
    left: list[Bytes] = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left
