"""What `glmserve plan` expects of a machine is what the simulator plays on it, and moves the right way."""

from dataclasses import replace
from typing import Any

import pytest

from config.forecast import MACHINES, Forecast, Machine, forecast, found
from config.plan import Geometry, MemoryPlan

GEOMETRY = Geometry(
    trunk_bytes=9_900_000_000, expert_bytes=(16_500_000,) * 75, num_experts=256, experts_per_token=8,
    kv_bytes_per_token=89_856, index_key_bytes_per_token=5_376, workspace_bytes=0, reader_buffer_bytes=0,
)  # fmt: skip
# A lone token computes 0.118 s: half of it the trunk's.
PLAYED_ON = Machine(19.8e9 / 0.118, 0.0, 1.1e12, "")
DISK = 13.5e9
# Slots, agents, the disk's rate in times of 13.5 GB/s, seconds of a step: `benchmarks.simulator --target`.
PLAYED = (
    (32, 1, 1.0, 0.344), (64, 1, 1.0, 0.298), (128, 1, 1.0, 0.218), (64, 1, 0.3, 0.919), (64, 1, 4.0, 0.122),
    (64, 4, 1.0, 1.191), (64, 8, 1.0, 2.554), (64, 16, 1.0, 5.069),
)  # fmt: skip


def plan(slots: int) -> MemoryPlan:
    return MemoryPlan(
        budget_bytes=0, minimum_budget_bytes=0, resident_bytes=0, max_context=32_768, lines={},
        slots_per_layer=(slots,) * 75, num_experts=256, reader_threads=8, sweep_tokens=32_768, ring_slots=4,
    )  # fmt: skip


def expected(slots: int, disk: float = DISK, machine: Machine = PLAYED_ON, **what: Any) -> Forecast:
    return forecast(GEOMETRY, plan(slots), disk, machine, **what)


@pytest.mark.parametrize(("slots", "agents", "disk", "step_s"), PLAYED)
def test_a_step_takes_what_the_simulator_played(slots: int, agents: int, disk: float, step_s: float) -> None:
    told = expected(slots, disk * DISK, agents=agents)
    assert agents / told.tokens_per_s == pytest.approx(step_s, rel=0.1)


def test_more_memory_and_faster_disks_help_and_long_contexts_cost() -> None:
    assert expected(32).tokens_per_s < expected(64).tokens_per_s < expected(200).tokens_per_s
    assert expected(64, 2e9).tokens_per_s < expected(64, 7e9).tokens_per_s
    assert expected(64, context=131_072).tokens_per_s < expected(64, context=4096).tokens_per_s
    firsts = [expected(64, prompt=n).first_token_s for n in (1, 16, 512, 8192, 65_536)]
    assert firsts == sorted(firsts)


def test_with_every_expert_in_memory_nothing_is_read() -> None:
    told = expected(256)
    assert (told.hit_rate, told.bytes_per_token) == (1.0, 0)
    assert told.tokens_per_s == expected(256, 1e6).tokens_per_s
    assert told.first_token_s == expected(256, 1e6).first_token_s


@pytest.mark.parametrize("agents", [1, 2, 8, 16])
def test_what_is_found_grows_with_what_is_there(agents: int) -> None:
    shares = [0.0, 0.02, 1 / 16, 0.2, 0.4, 0.7, 1.0]
    found_of = [found(share, agents) for share in shares]
    assert found_of == sorted(found_of)
    assert found_of[0] == 0
    assert found_of[-1] == 1


def test_two_rows_want_fewer_experts_than_two_tokens() -> None:
    assert expected(1, agents=16).bytes_per_token < expected(1).bytes_per_token


@pytest.mark.parametrize("name", MACHINES)
def test_each_kind_of_machine_says_how_far_it_may_be_off(name: str) -> None:
    assert MACHINES[name].error in expected(64, machine=MACHINES[name]).describe()
    slow_copy = replace(MACHINES[name], copy_bytes_per_s=1e9)
    assert expected(64, machine=slow_copy).tokens_per_s < expected(64, machine=MACHINES[name]).tokens_per_s
