"""How much memory can still be had, without anybody's suffering: read from the system when asked.

Linux: the least of what /proc/meminfo calls available and what is left in the memory cgroups that this
process lives in (version 1 or 2), page cache counted as free. macOS: by the rule of its kernel, which warns
while the compressor holds about as much as all pages that are neither wired nor compressed. Owns nothing but
the names of files; the governor calls it.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config.sizes import physical_memory_bytes
from server.engine.apple import (
    DARWIN,
    NORMAL_PRESSURE,
    pressure_level,
    uncompressed_and_compressed_bytes,
)

# What must stay available, as a part of all: 2 GB of 128 GB. The kernel begins to reclaim what is in use, or
# to swap, at less; and a budget that fills its cgroup, as is proper, leaves at least as much in its lines.
RESERVE = 64
# Banks shrink to where twice that is available, so that the next small allocation of a neighbour does not
# shrink them again; they grow as far as twice the reserve stays.
ROOMY = 2
# XNU (vm_pageout.c, read, never run by us) warns when less than 50 % of what is neither wired nor free of use
# is uncompressed, and takes the warning back above 60 %: at 1.5 uncompressed bytes for each compressed one.
CALM_RATIO = 1.5
# Beyond that ratio, as a part of all memory: half a gigabyte of 128.
CALM_MARGIN = 256


@dataclass(frozen=True)
class Room:
    """Memory that can be had now, in bytes, and what it is a part of."""

    available_bytes: int
    total_bytes: int

    @property
    def reserve_bytes(self) -> int:
        """With less than this available memory is short."""
        return self.total_bytes // RESERVE

    @property
    def is_short(self) -> bool:
        """Whether banks have to give something back."""
        return self.available_bytes < self.reserve_bytes

    @property
    def spare_bytes(self) -> int:
        """What banks may take; what they have to give back where it is negative."""
        return self.available_bytes - ROOMY * self.reserve_bytes

    @property
    def warns_early(self) -> bool:
        """Whether the system warns long before anybody suffers, and takes seconds to take it back."""
        return False


@dataclass(frozen=True)
class KernelRoom(Room):
    """macOS: how many bytes are neither wired nor compressed, how many the compressor holds, and its word."""

    compressed_bytes: int
    is_warned: bool

    @property
    def is_short(self) -> bool:
        """Whether the kernel warns."""
        return self.is_warned or self.available_bytes < self.compressed_bytes

    @property
    def spare_bytes(self) -> int:
        """What can be taken, or has to be given back, for the kernel to be calm with a margin."""
        calm_bytes = int(CALM_RATIO * self.compressed_bytes)
        return self.available_bytes - calm_bytes - self.total_bytes // CALM_MARGIN

    @property
    def warns_early(self) -> bool:
        """The kernel compresses and swaps before it ends a process."""
        return True


MeasureRoom = Callable[[], Room | None]  # None where the system does not tell


def choose_room(platform: str = sys.platform) -> MeasureRoom:
    """How room is measured on this platform."""
    if platform == DARWIN:
        return lambda: kernel_room(uncompressed_and_compressed_bytes(), pressure_level())
    return LinuxRoom()


def kernel_room(pages: tuple[int, int] | None, level: int) -> KernelRoom:
    """Makes the room of macOS from its (uncompressed, compressed) bytes and its level.

    Where it does not tell the bytes, a warning means that the margin is missing, and none that nothing is.
    """
    total = physical_memory_bytes()
    is_warned = level > NORMAL_PRESSURE
    uncompressed, compressed = pages or (0 if is_warned else total, 0)
    return KernelRoom(uncompressed, total, compressed, is_warned)


@dataclass(frozen=True)
class _Group:
    """The files of one memory cgroup, and what its statistics call page cache."""

    limit: Path
    used: Path
    statistics: Path
    cache: tuple[str, str]


class LinuxRoom:
    """The tightest limit. `root` is where /proc and /sys are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._meminfo = root / "proc/meminfo"
        self._groups = list(_groups(root))

    def __call__(self) -> Room | None:
        rooms = [room for room in (self._machine(), *map(_room_in, self._groups)) if room]
        return min(rooms, key=lambda room: room.available_bytes - room.reserve_bytes, default=None)

    def _machine(self) -> Room | None:
        try:
            lines = dict(line.split(":") for line in self._meminfo.read_text().splitlines())
            available, total = (int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
        except (OSError, ValueError, KeyError):
            return None
        return Room(available * 1024, total * 1024)


def _groups(root: Path) -> Iterator[_Group]:
    """The group of this process and all around it; in a container only those that are mounted there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            mount, is_first = root / "sys/fs/cgroup/memory", True
        elif not controllers:
            mount, is_first = root / "sys/fs/cgroup", False
        else:
            continue
        inside = Path(path.strip("/"))
        for folder in (mount / part for part in (inside, *inside.parents)):
            if is_first:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                cache = ("total_active_file", "total_inactive_file")
            else:
                names, cache = ("memory.max", "memory.current"), ("active_file", "inactive_file")
            if (folder / names[0]).exists():
                yield _Group(folder / names[0], folder / names[1], folder / "memory.stat", cache)


def _room_in(group: _Group) -> Room | None:
    """None where the group has no limit, or is gone."""
    try:
        limit = int(group.limit.read_text())  # `max` is no number
        used = int(group.used.read_text())
        statistics = dict(line.split() for line in group.statistics.read_text().splitlines())
        used -= sum(int(statistics[name]) for name in group.cache)
    except (OSError, ValueError, KeyError):
        return None
    return Room(max(0, limit - used), limit) if limit < physical_memory_bytes() else None
