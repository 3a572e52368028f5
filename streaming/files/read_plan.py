"""How the pieces of an expert become reads: neighbours merged, large ones cut.

Pure functions; called by the store on the engine's thread.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from streaming.files.index import ExpertIndex, Piece

# Bounds each reader's buffer, and lets several threads share the read of one expert: one request at a time
# leaves half of a fast SSD's rate unused, while from a few MiB on larger requests gain nothing (published:
# 9.5 GB/s at depth 1 against 17 GB/s at depth 4, both with 2.8 MB).
MAX_READ_BYTES = 8 * 2**20
# A gap of up to one page costs less than the request it saves, and keeps what is read within 2 % of what is
# needed.
MAX_GAP_BYTES = 4096
_CUT = 4096
# Where several disks share an expert: in so many reads, unless they would be smaller or larger than that.
SHARES = 8
MIN_SHARED_BYTES, MAX_SHARED_BYTES = 64 * 2**10, 2 * 2**20


# Named tuples: nine pieces are planned for each missed expert on the engine's thread, and a frozen dataclass
# takes three times as long to make.


class Segment(NamedTuple):
    """Bytes `at` .. `at + nbytes` of a run are bytes `start` .. of the numbered part."""

    part: int
    start: int
    at: int
    nbytes: int


class Run(NamedTuple):
    """One read: a byte range of a file and what it is made of."""

    path: Path
    offset: int
    nbytes: int
    segments: tuple[Segment, ...]


class _Cut(NamedTuple):
    path: Path
    offset: int
    nbytes: int
    part: int
    start: int


def plan_runs(pieces: Sequence[Piece], max_bytes: int = MAX_READ_BYTES) -> list[Run]:
    """The reads that bring all pieces of one expert, none above `max_bytes`, in order of file and offset."""
    cuts = sorted(
        (cut for number, piece in enumerate(pieces) for cut in _cuts(number, piece, max_bytes)),
        key=lambda cut: (str(cut.path), cut.offset),  # comparing paths takes longer than all the rest
    )
    runs: list[Run] = []
    group: list[_Cut] = []
    for cut in cuts:
        if group and not _joins(group, cut, max_bytes):
            runs.append(_make_run(group))
            group = []
        group.append(cut)
    if group:
        runs.append(_make_run(group))
    return runs


def plan_shared_runs(pieces: Sequence[Piece]) -> list[Run]:
    """The same where several disks share the expert: in more and smaller reads."""
    nbytes = sum(piece.part.nbytes for piece in pieces)
    return plan_runs(pieces, min(max(nbytes // SHARES, MIN_SHARED_BYTES), MAX_SHARED_BYTES))


def largest_run_bytes(index: ExpertIndex) -> int:
    """The largest read that any expert needs: what a reader's buffer must hold."""
    if all(index.expert_bytes(layer) > MAX_READ_BYTES for layer in index.layers):
        return MAX_READ_BYTES
    return max(
        run.nbytes
        for layer in index.layers
        for expert in range(index.num_experts)
        for run in plan_runs(index.pieces(layer, expert))
    )


def _cuts(number: int, piece: Piece, max_bytes: int) -> Iterator[_Cut]:
    nbytes = piece.part.nbytes
    if nbytes <= max_bytes:
        yield _Cut(piece.path, piece.offset, nbytes, number, 0)
        return
    count = -(-nbytes // max_bytes)
    step = -(-nbytes // (count * _CUT)) * _CUT
    for start in range(0, nbytes, step):
        yield _Cut(piece.path, piece.offset + start, min(step, nbytes - start), number, start)


def _joins(group: Sequence[_Cut], cut: _Cut, max_bytes: int) -> bool:
    end = group[-1].offset + group[-1].nbytes
    return (
        (cut.path is group[0].path or cut.path == group[0].path)
        and cut.offset - end <= MAX_GAP_BYTES
        and cut.offset + cut.nbytes - group[0].offset <= max_bytes
    )


def _make_run(group: Sequence[_Cut]) -> Run:
    first = group[0].offset
    segments = tuple(Segment(cut.part, cut.start, cut.offset - first, cut.nbytes) for cut in group)
    return Run(group[0].path, first, group[-1].offset + group[-1].nbytes - first, segments)
