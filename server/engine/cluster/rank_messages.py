"""What crosses between rank 0 and the other ranks of a cluster. Owns nothing; used on both sides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Introduction:
    """The first message to rank 0. `address`: of this machine, free for MLX's ring.

    `facts`: what must be the same on all machines, by name.
    """

    node: int
    address: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Welcome:
    """The answer: who is there, in the order of ranks, and which of them the machine is."""

    rank: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """The rank has its part of the model in memory."""


@dataclass(frozen=True)
class Beat:
    """The process that sends this is not stopped."""


@dataclass(frozen=True)
class Gone:
    """The rank ends. `reason`: what has become of it, such as "has ended"."""

    reason: str


# What ranks are told to repeat. Caches and forwards have numbers.


@dataclass(frozen=True)
class Made:
    """An empty cache was made."""

    cache: int


@dataclass(frozen=True)
class Dropped:
    """Nobody has the cache any more."""

    cache: int


@dataclass(frozen=True)
class Changed:
    """A method of a cache was called that changes it."""

    cache: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class NumberedSpan:
    """A span, as `models.attention.attention.Span`."""

    cache: int
    start: int
    stop: int
    origin: int | None
    num_shared: int


@dataclass(frozen=True)
class Begun:
    """A forward was begun; nothing of it is computed yet."""

    forward: int
    tokens: bytes  # int32
    spans: tuple[NumberedSpan, ...]


@dataclass(frozen=True)
class Advanced:
    """A forward goes on to its next pause."""

    forward: int


@dataclass(frozen=True)
class GivenUp:
    """A forward was given up, or failed; caches keep what they had before, once they are trimmed."""

    forward: int


Repeated = Made | Dropped | Changed | Begun | Advanced | GivenUp
RankMessage = Introduction | Welcome | Loaded | Beat | Gone | Repeated
