"""Sizes as people write them: 100G, 96GiB, 80%. Called by settings and by the memory plan's messages."""

import os
import re

UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
# No more digits than a float takes with every unit: what is infinite has no integer.
_SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*(%|[A-Za-z]*)")


def physical_memory_bytes() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_size(text: str, memory_bytes: int | None = None) -> int:
    """Bytes of a size like `100G` (10^9), `96GiB` (2^30) or `80%` (of `memory_bytes`, by default
    physical memory).

    Raises ValueError, with the forms that would have been right, for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, unit = float(match[1]), match[2].upper()
        if unit == "%" and 0 < number <= 100:
            return int((memory_bytes or physical_memory_bytes()) * number / 100)
        if unit in UNITS and number * UNITS[unit] >= 1:
            return int(number * UNITS[unit])
    raise ValueError(f"{text[:40]!r} is not a size; write 100G (10^9 bytes), 96GiB (2^30) or 80% (of memory)")


def format_size(num_bytes: float) -> str:
    """A size for people, in decimal units: `15.8 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"
