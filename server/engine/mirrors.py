"""The copies of the checkpoint that the engine reads from, found before the disk is used."""

import logging
from collections.abc import Sequence
from pathlib import Path

from streaming.disk.comparison import Comparison, Verdicts
from streaming.disk.copies import find_copies
from streaming.disk.disk import DirectDisk, Disk
from streaming.disk.mirror import MirroredDisk
from streaming.files.index import ExpertIndex

VERDICTS_NAME = "mirrors.json"

log = logging.getLogger(__name__)


def open_mirrors(
    directory: Path, experts: ExpertIndex, mirrors: Sequence[Path], records: Path | None
) -> tuple[Disk, Comparison | None]:
    """Opens the disk that experts are read from, and a comparison, not yet begun, where there are mirrors.

    `records`: folder of earlier verdicts. CheckpointError where a mirror's samples differ.
    """
    verdicts, used = Verdicts(records / VERDICTS_NAME if records else None), []
    for path in dict.fromkeys(mirrors):
        mirror = find_copies(directory, path, experts.stamps)
        if verdicts.is_equal(mirror) is False:
            log.error("--mirror %s is not used: it differs from the checkpoint; copy it again", path)
        else:
            used.append(mirror)
    if not used:
        return DirectDisk(), None
    disk = MirroredDisk(directory, used, [DirectDisk() for _ in range(1 + len(used))])
    return disk, Comparison(disk, verdicts)
