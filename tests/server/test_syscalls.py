"""System calls that fail below the server: the shim does what it says, and schedules are survived."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.syscalls.faults import KINDS, Control, Schedule, build_shim
from benchmarks.syscalls.schedules import Row, Table, run_schedules, run_starts
from server.commands.checkpoint import POCKET

READER = """
import os, sys
how, *paths = sys.argv[1:]
for path in paths:
    try:
        with open(path, "rb", buffering=0) as file:
            if how == "read":
                print(len(file.read(1000)))
            elif how == "pread":
                print(len(os.pread(file.fileno(), 1000, 0)))
            else:
                print(os.preadv(file.fileno(), [bytearray(500), bytearray(500)], 0))
        with open(path + ".new", "wb", buffering=0) as file:
            print(file.write(b"x"))
    except OSError as error:
        print(error.strerror)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build_shim(tmp_path_factory.mktemp("shim") / "shim.so")
    if found is None:
        pytest.skip("there is no C compiler here, or this is not Linux")
    return found


@pytest.mark.parametrize("how", ["read", "pread", "preadv"])  # the last is how experts are read
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
    library: Path, tmp_path: Path, kind: str, inside: str, how: str
) -> None:
    (tmp_path / "under").mkdir()
    paths = [tmp_path / "under" / "file", tmp_path / "file"]
    for path in paths:
        path.write_bytes(bytes(1000))
    control = Control(tmp_path / "control")
    control.begin(Schedule(7, (KINDS.index(kind),), 1000, 1000, 1.0))
    env = {"LD_PRELOAD": str(library), "SYSCALL_SHIM": str(tmp_path / "control")}
    env |= {"SYSCALL_SHIM_UNDER": str(tmp_path / "under")}
    command = [sys.executable, "-c", READER, how, *map(str, paths)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
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
    running = list(run_schedules(library, tmp_path, range(10)))
    starts = list(run_starts(library, tmp_path, range(3)))
    assert [row for row in running + starts if row.faults] == []
    assert sum(row.num_failed_calls for row in running)


def test_rows_of_two_runs_are_one_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    whole = Row("running", 3, ["EMFILE"], 2, 1.0, 4, {"right": 8}, 0.5, [])
    Table(path).add(replace(whole, seed=2, outcomes={"503 in words": 1}, recovery_s=None, faults=["late"]))
    Table(path).add(replace(whole, outcomes={"right": 7}))
    table = Table(path)
    table.add(whole)
    told, ending = table.summary("running")
    assert "2 schedules, 8 calls interfered with; 8 right, 1 503 in words" in told
    assert "0.5 s at most; 1 schedules wrong" in ending
