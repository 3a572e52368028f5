"""Sizes, tokens, times and shares as people write them: 96GiB, 32k, 10m, 80%. For settings and messages."""

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


def parse_tokens(text: str) -> int:
    """Tokens of a number such as `32k` (32,768) or `1m` (1,048,576). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kKmM]?)", text.strip().replace("_", ""))
    tokens = float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0.5
    if tokens != int(tokens):
        raise ValueError(f"{text[:40]!r} is no number of tokens; write 32768, 32k or 1m")
    return int(tokens)


def parse_seconds(text: str) -> float:
    """Seconds of a time such as `90`, `30s`, `10 min` or `1.5h`. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*(s|m|min|h|d|)", text.strip())
    if not match:
        raise ValueError(f"{text[:40]!r} is no time; write 90, 30s, 10m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}[match[2]]


def parse_share(text: str) -> float:
    """The share that `0.3` or `30%` is. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?|\.\d+)\s*(%?)", text.strip())
    if not match:
        raise ValueError(f"{text[:40]!r} is no share; write 0.3 or 30%")
    return float(match[1]) / (100 if match[2] else 1)


def in_words(seconds: int) -> str:
    """A time for people, in its two largest units: `5 h 35 min`."""
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def format_size(num_bytes: float) -> str:
    """A size for people, in decimal units: `15.8 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"
