"""System calls that fail below the server: the shim does what it says, and schedules are survived."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.syscalls.schedules import KINDS, Control, Schedule, build_shim, run_schedules, run_starts
from server.commands.checkpoint import POCKET

READER = """
import os, sys
for path in sys.argv[1:]:
    try:
        with open(path, "rb", buffering=0) as file:
            print(len(file.read(1000)))
        with open(path + ".new", "wb", buffering=0) as file:
            print(file.write(b"x"))
    except OSError as error:
        print(error.strerror)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build_shim(tmp_path_factory.mktemp("shim"))
    if found is None:
        pytest.skip("there is no C compiler here, or this is not Linux")
    return found


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("EIO on reads", "Input/output error"),
        ("EIO on writes", "Input/output error"),
        ("ENOSPC", "No space left on device"),
        ("EMFILE", "Too many open files"),
        ("short reads", "short"),
    ],
)
def test_calls_fail_under_the_folder_and_nowhere_else(
    library: Path, tmp_path: Path, kind: str, inside: str
) -> None:
    (tmp_path / "under").mkdir()
    paths = [tmp_path / "under" / "file", tmp_path / "file"]
    for path in paths:
        path.write_bytes(bytes(1000))
    control = Control(tmp_path / "control")
    control.begin(Schedule(7, (KINDS.index(kind),), 1000, 1000, 1.0))
    env = {"LD_PRELOAD": str(library), "SYSCALL_SHIM": str(tmp_path / "control")}
    env |= {"SYSCALL_SHIM_UNDER": str(tmp_path / "under")}
    done = subprocess.run([sys.executable, "-c", READER, *paths], env=env, capture_output=True, text=True)
    *said, whole, written = done.stdout.split("\n")[:-1]
    assert (whole, written) == ("1000", "1"), done
    assert control.end() > 0
    if inside == "short":
        assert 0 < int(said[0]) < 1000
    else:
        assert said[-1] == inside


def test_a_schedule_is_that_of_its_seed() -> None:
    assert [Schedule.of(seed) for seed in range(50)] == [Schedule.of(seed) for seed in range(50)]
    assert {kind for seed in range(50) for kind in Schedule.of(seed).kinds} == set(range(len(KINDS)))


@pytest.mark.long
@pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout")
def test_a_few_schedules_are_survived(library: Path, tmp_path: Path) -> None:
    running = run_schedules(library, tmp_path, range(10))
    assert running.faults == []
    assert running.num_failed_calls
    assert run_starts(library, tmp_path, range(3)).faults == []
