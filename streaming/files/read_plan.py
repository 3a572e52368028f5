"""How the pieces of an expert become reads: neighbours merged, large ones cut.

Pure functions; called by the store on the engine's thread.
"""

from collections.abc import Sequence
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
# Cuts lie on pages of Apple silicon where the stretch starts on one.
_CUT = 16_384
# Into how many reads an expert is cut that several disks share, unless reads would leave these bounds.
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


def plan_runs(pieces: Sequence[Piece], max_bytes: int = MAX_READ_BYTES) -> list[Run]:
    """The reads that bring all pieces of one expert, none above `max_bytes`, in order of file and offset.

    Neighbours make one stretch of a file, which is read at once, or in equal runs where it is long.
    """
    # Comparing paths takes longer than all the rest.
    ordered = sorted(range(len(pieces)), key=lambda number: (str(pieces[number].path), pieces[number].offset))
    runs: list[Run] = []
    stretch: list[int] = []
    end = 0
    for number in ordered:
        piece = pieces[number]
        if stretch and (piece.offset - end > MAX_GAP_BYTES or piece.path != pieces[stretch[0]].path):
            runs += _cut(stretch, pieces, end, max_bytes)
            stretch = []
        stretch.append(number)
        end = piece.offset + piece.part.nbytes
    return runs + (_cut(stretch, pieces, end, max_bytes) if stretch else [])


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


def _cut(stretch: Sequence[int], pieces: Sequence[Piece], end: int, max_bytes: int) -> list[Run]:
    """The runs of these pieces, which lie side by side up to `end`."""
    path, first = pieces[stretch[0]].path, pieces[stretch[0]].offset
    count = -(-(end - first) // max_bytes)
    step = min(-(-(end - first) // (count * _CUT)) * _CUT, max_bytes)
    return [
        _make_run(stretch, pieces, path, start, min(start + step, end)) for start in range(first, end, step)
    ]


def _make_run(stretch: Sequence[int], pieces: Sequence[Piece], path: Path, start: int, stop: int) -> Run:
    segments = []
    for number in stretch:
        part, _, offset = pieces[number]
        low, high = max(start, offset), min(stop, offset + part.nbytes)
        if low < high:
            segments.append(Segment(number, low - offset, low - start, high - low))
    return Run(path, start, stop - start, tuple(segments))
