"""The copies of the checkpoint that the engine reads from, and what happens when one turns out to be wrong.

`open_mirrors` is called before the disk is used. `MirrorWatch` stands before the governor: the loop asks it
between two steps, and it ends the engine once a difference was found, because experts in memory, running
requests and prompts in memory may all be wrong. The HTTP process starts another, without that mirror.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from config.errors import EngineError
from server.engine.memory.governor import Memory
from server.link.messages import Failed, Replan, Replanned
from streaming.disk.comparison import Comparison, Verdicts
from streaming.disk.copies import find_copies
from streaming.disk.disk import DirectDisk, Disk
from streaming.disk.mirror import MirroredDisk
from streaming.files.index import ExpertIndex

VERDICTS_NAME = "mirrors.json"
# While a comparison runs, an engine without work looks so often whether it has found something.
LOOK_S = 1.0

log = logging.getLogger(__name__)


class MirrorDiffersError(EngineError):
    """A mirror was read from and is not equal to the checkpoint."""

    def __init__(self, mirror: Path) -> None:
        super().__init__(f"--mirror {mirror} differs from the checkpoint; nothing read from it is kept")
        self.mirror = mirror


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


class MirrorWatch:
    """The loop's `Memory`, which ends the engine once the comparison has found a difference."""

    def __init__(self, memory: Memory, comparison: Comparison) -> None:
        self._memory, self._comparison = memory, comparison

    @property
    def pause_s(self) -> float | None:
        """How long the loop may rest until `govern` must be called again."""
        pause_s = self._memory.pause_s
        return pause_s if self._comparison.is_proven else min(LOOK_S, LOOK_S if pause_s is None else pause_s)

    def govern(self) -> bool:
        """Raises MirrorDiffersError once a difference was found; else as the memory's own."""
        if (mirror := self._comparison.found) is not None:
            raise MirrorDiffersError(mirror)
        return self._memory.govern()

    def replan(self, command: Replan) -> Replanned | Failed:
        """Passes the command on."""
        return self._memory.replan(command)

    def measure(self) -> Mapping[str, float]:
        """Adds how much of the mirrors has been compared."""
        return {**self._memory.measure(), "mirror_compared": self._comparison.share}
