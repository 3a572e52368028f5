"""What the files of a checkpoint were when they were opened first, so that a change under us is noticed.

A mark is a file's stamp and a digest of samples of its bytes. A file that was only touched has another stamp
and the same samples: that is no change. Called by the engine process when it starts, and by the disk where a
stamp differs.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from config.errors import CheckpointChanged, DiskError
from streaming.files.headers import FileStamp

# Of each file, spread evenly from its first byte to its last; smaller files are read whole. The hundred files
# of a checkpoint take a second or two.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
MARKED = frozenset([".safetensors", ".json", ".jinja", ".model"])


@dataclass(frozen=True)
class FileMark:
    """A file's stamp, and a digest of samples of its bytes."""

    stamp: FileStamp
    digest: bytes

    @classmethod
    def of(cls, path: Path) -> "FileMark":
        """The mark of a file as it is now. Raises DiskError where it cannot be read."""
        try:
            with path.open("rb", buffering=0) as file:
                stamp = FileStamp.from_stat(os.fstat(file.fileno()))
                return cls(stamp, _digest(file.fileno(), stamp.num_bytes))
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error

    @property
    def content(self) -> tuple[int, bytes]:
        """Size and digest, which a touch leaves as they are."""
        return self.stamp.num_bytes, self.digest


def mark_checkpoint(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Contents of the files that make a checkpoint, by their names; empty where there is no such folder."""
    if not directory.is_dir():
        return {}
    paths = [path for path in sorted(directory.iterdir()) if path.suffix in MARKED and path.is_file()]
    return {path.name: FileMark.of(path).content for path in paths}


def refuse_changed(directory: Path, marks: Mapping[str, tuple[int, bytes]]) -> None:
    """Raises CheckpointChanged where the checkpoint is not the one that was marked."""
    now = mark_checkpoint(directory)
    for name in sorted({*marks, *now}):
        then, found = marks.get(name), now.get(name)
        if then != found:
            what = "is new" if then is None else "is gone" if found is None else "has other content"
            raise CheckpointChanged(
                f"the checkpoint {directory} was changed while the server ran: {name} {what}. Restart the "
                "server to serve what is there now, or put back what was there"
            )


def _digest(fd: int, num_bytes: int) -> bytes:
    digest = hashlib.sha256()
    last = max(0, num_bytes - SAMPLE_BYTES)
    step = max(SAMPLE_BYTES, -(-last // (NUM_SAMPLES - 1)))
    for offset in [*range(0, last, step), last]:
        digest.update(os.pread(fd, SAMPLE_BYTES, offset))
    return digest.digest()
