"""Compares mirrors with the checkpoint in full, once, behind the server's back.

Owns a thread of low priority and the file of verdicts. While experts are being read it takes a twentieth of
the time. A file of a mirror is read from when it was compared; the first difference drops the mirror.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from config.errors import DiskError
from streaming.disk.copies import Mirror
from streaming.disk.disk import DirectDisk, Disk, aligned_buffer
from streaming.disk.mirror import MirroredDisk
from streaming.disk.reads import read_fully
from streaming.files.headers import FileStamp

PIECE_BYTES = 4 * 2**20
# While experts are read, and so long after: a piece, then a pause of so many times its time.
QUIET_S = 0.25
PAUSES = 19
# How often the log says how far it is.
TELL_SHARE = 0.1

log = logging.getLogger(__name__)


class Verdicts:
    """Which mirrors were compared in full, as they are now, and whether they were equal; kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_equal: dict[str, bool] = {}
        if path is not None:
            try:
                found = json.loads(path.read_bytes())
                self._is_equal = {key: value for key, value in found.items() if isinstance(value, bool)}
            except (OSError, ValueError, AttributeError):
                self._is_equal = {}  # they are compared again

    def is_equal(self, mirror: Mirror) -> bool | None:
        """Whether the copies are equal; None where they were not compared as they are now."""
        return self._is_equal.get(mirror.identity())

    def note(self, mirror: Mirror, is_equal: bool) -> None:
        """Remembers a verdict, for the next start too."""
        self._is_equal[mirror.identity()] = is_equal
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._is_equal))
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("%s cannot be written (%s): mirrors are compared again", self._path, error.strerror)


class Comparison:
    """Compares what is not yet known to be equal; until then the disk reads nothing of it."""

    def __init__(
        self,
        disk: MirroredDisk,
        verdicts: Verdicts,
        make_disk: Callable[[], Disk] = DirectDisk,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._disk, self._verdicts, self._make_disk = disk, verdicts, make_disk
        self._is_stopped = threading.Event()
        self._sleep = sleep or self._is_stopped.wait
        self._open = {
            number: mirror
            for number, mirror in enumerate(disk.mirrors, start=1)
            if verdicts.is_equal(mirror) is not True
        }
        for number in self._open:
            disk.doubt(number)
        sizes = [stamp.num_bytes for mirror in self._open.values() for stamp in mirror.copies.values()]
        self._num_done, self._num_bytes = 0, sum(sizes)

    @property
    def is_proven(self) -> bool:
        """Whether every mirror was found to be equal to the checkpoint."""
        return not self._open

    @property
    def share(self) -> float:
        """How much of what had to be compared has been, 0 to 1."""
        return self._num_done / self._num_bytes if self._num_bytes else 1.0

    def start(self) -> None:
        """Compares on a thread of its own."""
        if self._open:
            threading.Thread(target=self.run, name="mirror-comparison", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread soon; nothing is said about what it has not read."""
        self._is_stopped.set()

    def run(self) -> None:
        """Compares all that is open."""
        for number, mirror in list(self._open.items()):
            try:
                where = self._difference(number, mirror)
            except (OSError, DiskError) as error:
                log.warning("--mirror %s could not be compared in full: %s", mirror.path, error)
                continue
            if where is not None:
                self._verdicts.note(mirror, is_equal=False)
                self._disk.drop(number, f"it differs from the checkpoint, {where}; copy it again")
            elif not (self._is_stopped.is_set() or self._disk.is_dropped(number)):
                self._verdicts.note(mirror, is_equal=True)
                del self._open[number]
                log.info("--mirror %s is equal to the checkpoint in every byte", mirror.path)

    def _difference(self, number: int, mirror: Mirror) -> str | None:
        """Says where the first difference is; None where there is none, or nobody reads there any more."""
        for path, stamp in mirror.copies.items():
            at = self._differs_at(number, path, FileStamp.from_path(path), mirror.copy_of(path), stamp)
            if at is not None:
                return f"in {mirror.copy_of(path).name}, in the {PIECE_BYTES} bytes from byte {at} on"
            if not (self._is_stopped.is_set() or self._disk.is_dropped(number)):
                self._disk.trust(number, path)
        return None

    def _differs_at(
        self, number: int, path: Path, stamp: FileStamp, copy: Path, copy_stamp: FileStamp
    ) -> int | None:
        """Returns the start of the first piece that differs."""
        disk = self._make_disk()
        pieces = [aligned_buffer(PIECE_BYTES), aligned_buffer(PIECE_BYTES)]
        with closing(disk.open(path, stamp)) as ours, closing(disk.open(copy, copy_stamp)) as theirs:
            for at in range(0, stamp.num_bytes, PIECE_BYTES):
                if self._is_stopped.is_set() or self._disk.is_dropped(number):
                    return None
                begun_s, nbytes = time.monotonic(), min(PIECE_BYTES, stamp.num_bytes - at)
                for file, piece in zip((ours, theirs), pieces, strict=True):
                    read_fully(file, [piece], at, nbytes)
                    file.check()
                if not np.array_equal(pieces[0][:nbytes], pieces[1][:nbytes]):
                    return at
                self._tell(nbytes)
                self._give_way(time.monotonic() - begun_s)
        return None

    def _give_way(self, took_s: float) -> None:
        if self._disk.idle_s < QUIET_S:
            self._sleep(PAUSES * took_s)

    def _tell(self, nbytes: int) -> None:
        before = self.share
        self._num_done += nbytes
        if int(self.share / TELL_SHARE) > int(before / TELL_SHARE) and self.share < 1:
            log.info("mirrors are being compared with the checkpoint: %.0f %%", 100 * self.share)
