"""What a check of `glmserve doctor` says. Pure data; every check yields findings, the command prints them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from config.settings import Settings

Figure = float | int | str | Sequence[float]


class Verdict(StrEnum):
    """How a finding is to be taken."""

    GOOD = "good"
    NOTE = "note"  # worth reading, nothing to do
    FAULT = "fault"  # something must be done; the command's exit code is 1


@dataclass(frozen=True)
class Finding:
    """One sentence of a check: what was found and, for a fault, what to do. Figures are for programs.

    It goes into reports that people publish: no user names, host names, paths or serial numbers.
    """

    verdict: Verdict
    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A question with a short title. `run` yields findings; the command reports what it raises."""

    title: str
    run: Callable[[Settings], Iterator[Finding]]
