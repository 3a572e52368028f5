"""--ram-budget is a ceiling: the server in a memory cgroup whose hard limit is the budget.

The checkpoint is four times as large. `python -m benchmarks.ceiling` does the same with 32 requests.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.ceiling import CGROUPS, make_large, run


@pytest.mark.root
@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif(
    not (CGROUPS / "memory.limit_in_bytes").exists(), reason="needs memory cgroups, version 1"
)
def test_the_budget_is_never_exceeded() -> None:
    with TemporaryDirectory() as scratch:  # pytest would keep the two gigabytes
        assert run(make_large(Path(scratch) / "large"), "850M", requests=2, prompt_tokens=1000, tokens=64)
