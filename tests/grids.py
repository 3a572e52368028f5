"""Tables of cases: `make test` has a few of each kind, `make test-slow` all the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """Marks every case but those in `keep` as slow; one of several values is kept by its first.

    Returns what `parametrize` takes.
    """
    found = [case if isinstance(case, tuple) else (case,) for case in cases]
    assert all(any(case[0] == one for case in found) for one in keep), "a case that is kept must be there"
    return [pytest.param(*case, marks=() if case[0] in keep else pytest.mark.slow) for case in found]
