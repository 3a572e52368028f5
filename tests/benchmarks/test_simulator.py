"""The simulator is the product on another clock: what it reads and misses is what threads and sleeps do."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.simulator.checked import CHECKED
from benchmarks.simulator.scenes import SPARSE, checkpoint_of, play

COUNTS = ("misses", "hit_rate", "num_bytes")
SCENES = {scene.name: scene for scene in CHECKED}


def simulated(*names: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.simulator", *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["160 slots", "alone, nearness", "4 agents, no guesses"])
def test_it_counts_what_threads_count(name: str) -> None:
    [predicted] = simulated(name)
    with checkpoint_of(SPARSE) as checkpoint:
        measured = play(SCENES[name], checkpoint)
    assert {key: predicted[key] for key in COUNTS} == {key: getattr(measured, key) for key in COUNTS}
    assert predicted["wall_s"] < 1.1 * measured.wall_s, "a machine can be later than its parts, not earlier"


@pytest.mark.slow
def test_it_says_the_same_again() -> None:
    names = ("fast disk", "8 agents, 160 slots")
    assert simulated(*names) == simulated(*names)


@pytest.mark.slow
def test_a_slower_disk_and_fewer_slots_take_longer() -> None:
    took = {one["scene"]: one["decode_s"] for one in simulated("slow disk", "16 slots", "160 slots")}
    assert took["slow disk"] > took["16 slots"] > took["160 slots"]
