"""Reads of whole aligned blocks, as a disk without page cache wants them.

Pure functions, used by the reader's threads and by the probe, which must read as they do.
"""

from streaming.disk import MAX_ALIGNMENT, DiskFile
from streaming.floats import Bytes


def buffer_bytes(max_read_bytes: int) -> int:
    """One thread's buffer: room for the largest read wherever it starts."""
    return -(-max_read_bytes // MAX_ALIGNMENT) * MAX_ALIGNMENT + 2 * MAX_ALIGNMENT


def aligned_range(alignment: int, offset: int, nbytes: int) -> tuple[int, int]:
    """Start and length of the aligned read that covers `nbytes` at `offset`."""
    start = offset // alignment * alignment
    return start, -(-(offset - start + nbytes) // alignment) * alignment


def read_fully(file: DiskFile, buffer: Bytes, offset: int, num_needed: int) -> None:
    """Reads until `num_needed` bytes are there, going on after short reads from the last aligned byte."""
    done = 0
    while done < num_needed:
        try:
            count = file.read_into(buffer[done:], offset + done)
        except InterruptedError:
            continue
        if done + count >= num_needed:
            return
        resume = (done + count) // file.alignment * file.alignment
        if resume <= done:
            raise OSError(f"the file ends {num_needed - done - count} bytes early")
        done = resume
