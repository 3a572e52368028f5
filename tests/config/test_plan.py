import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import BudgetError
from config.plan import Geometry, make_plan, reader_buffers
from config.plan_report import as_dict, render_plan
from config.sizes import parse_size

GB = 10**9
# GLM-5.2 at 3.5 bits per weight: 75 layers of 256 experts of 15.75 MiB, 89,856 + 5,376 bytes per token.
GLM = Geometry(
    trunk_bytes=11 * GB,
    expert_bytes=(16_515_072,) * 75,
    num_experts=256,
    experts_per_token=8,
    kv_bytes_per_token=89_856,
    index_key_bytes_per_token=5_376,
    workspace_bytes=2 * GB,
    reader_buffer_bytes=GB // 125,
)


def test_a_hundred_gigabytes_give_glm_about_sixty_five_slots_a_layer() -> None:
    plan = make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB)
    assert plan.lines["KV cache"] == 95_232 * (32_768 * 17 // 16 + 32 * 64)
    assert sum(plan.lines.values()) <= 100 * GB
    assert 100 * GB - sum(plan.lines.values()) < 16_515_072, "less than a slot may be left over"
    assert 60 <= min(plan.slots_per_layer) <= max(plan.slots_per_layer) <= 70


@given(budget=st.integers(0, 500 * GB), max_context=st.integers(1, 200_000))
def test_the_plan_never_exceeds_the_budget_and_refuses_only_below_the_minimum(
    budget: int, max_context: int
) -> None:
    try:
        plan = make_plan(GLM, budget, max_context, physical_bytes=500 * GB)
    except BudgetError:
        minimum = make_plan(GLM, 500 * GB, max_context, physical_bytes=500 * GB).minimum_budget_bytes
        assert budget < minimum
    else:
        assert sum(plan.lines.values()) <= budget
        assert min(plan.slots_per_layer) >= 8
        assert max(plan.slots_per_layer) <= 256
        assert plan.is_resident == (budget >= plan.resident_bytes)


def test_the_refusal_names_a_budget_that_is_then_taken() -> None:
    with pytest.raises(BudgetError) as refusal:
        make_plan(GLM, 5 * GB, 4096, physical_bytes=128 * GB)
    assert "a shorter --max-context needs less" in str(refusal.value)
    named = str(refusal.value).split("needs ")[1].split()[0]
    assert min(make_plan(GLM, parse_size(named), 4096, physical_bytes=128 * GB).slots_per_layer) == 8


def test_the_minimum_is_exact() -> None:
    minimum = make_plan(GLM, 100 * GB, 4096, physical_bytes=128 * GB).minimum_budget_bytes
    assert make_plan(GLM, minimum, 4096, physical_bytes=128 * GB).slots_per_layer == (8,) * 75
    with pytest.raises(BudgetError):
        make_plan(GLM, minimum - 1, 4096, physical_bytes=128 * GB)


def test_a_budget_above_physical_memory_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"200\.0 GB is above the memory of this machine: 128\.0 GB"):
        make_plan(GLM, 200 * GB, 4096, physical_bytes=128 * GB)


def test_layers_of_different_size_get_the_same_number_of_slots_or_one_more() -> None:
    geometry = dataclasses.replace(GLM, expert_bytes=(20 * 10**6, 10 * 10**6, 30 * 10**6))
    plan = make_plan(geometry, 18 * GB, 4096, physical_bytes=128 * GB)
    assert max(plan.slots_per_layer) - min(plan.slots_per_layer) <= 1


@given(
    budget=st.integers(30 * GB, 400 * GB),
    sizes=st.lists(st.integers(10 * 10**6, 30 * 10**6), min_size=2, max_size=75),
    workspace=st.integers(0, 4 * GB),
)
def test_the_largest_bank_may_be_there_twice_while_no_step_is_under_way(
    budget: int, sizes: list[int], workspace: int
) -> None:
    geometry = dataclasses.replace(GLM, expert_bytes=tuple(sizes), workspace_bytes=workspace)
    plan = make_plan(geometry, budget, 4096, physical_bytes=500 * GB)
    assert sum(plan.lines.values()) <= budget
    if not plan.is_resident:
        banks = [slots * nbytes for slots, nbytes in zip(plan.slots_per_layer, sizes, strict=True)]
        assert plan.lines["workspace"] == max(workspace, *banks)
        assert budget - sum(plan.lines.values()) < 2 * max(sizes)


def test_the_least_budget_lets_banks_move_too() -> None:
    cramped = dataclasses.replace(GLM, workspace_bytes=0)
    plan = make_plan(cramped, 100 * GB, 4096, physical_bytes=128 * GB)
    least = make_plan(cramped, plan.minimum_budget_bytes, 4096, physical_bytes=128 * GB)
    assert least.slots_per_layer == (8,) * 75
    assert least.lines["workspace"] == 8 * 16_515_072
    with pytest.raises(BudgetError):
        make_plan(cramped, plan.minimum_budget_bytes - 1, 4096, physical_bytes=128 * GB)


def test_the_plan_is_printed_for_people_and_for_programs() -> None:
    plan = make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB)
    text = render_plan(plan)
    assert "trunk" in text
    assert "11.0 GB" in text
    assert f"{min(plan.slots_per_layer)} to {max(plan.slots_per_layer)} of 256 experts" in text
    assert json.loads(json.dumps(as_dict(plan)))["minimum_budget_bytes"] == plan.minimum_budget_bytes


def test_a_large_budget_has_room_for_more_reader_threads_and_the_smallest_for_some() -> None:
    large = make_plan(GLM, 100 * GB, 4096, physical_bytes=128 * GB)
    small = make_plan(GLM, large.minimum_budget_bytes, 4096, physical_bytes=128 * GB)
    assert small.reader_threads == 8 < large.reader_threads <= 32
    for plan in (small, large):
        assert plan.lines["reader buffers"] == reader_buffers(plan.reader_threads) * GLM.reader_buffer_bytes


def test_threads_that_the_disk_does_not_need_leave_their_memory_to_the_experts() -> None:
    before = make_plan(GLM, 100 * GB, 4096, physical_bytes=128 * GB)
    after = make_plan(GLM, 100 * GB, 4096, reader_threads=4, physical_bytes=128 * GB)
    assert after.lines["reader buffers"] == 5 * GLM.reader_buffer_bytes < before.lines["reader buffers"]
    assert after.lines["experts"] > before.lines["experts"]
    assert after.minimum_budget_bytes == before.minimum_budget_bytes


def test_saved_prompts_get_a_twenty_fifth_and_at_most_four_contexts() -> None:
    plan = make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB)
    assert plan.lines["prefix cache"] == 4 * GB
    short = make_plan(GLM, 100 * GB, 4096, physical_bytes=128 * GB)
    assert short.lines["prefix cache"] == 4 * 4096 * 95_232


@pytest.mark.parametrize("given", [0, GB, 30 * GB])
def test_saved_prompts_get_what_is_asked_for(given: int) -> None:
    plan = make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB, prefix_bytes=given)
    assert plan.lines["prefix cache"] == given
    assert sum(plan.lines.values()) <= 100 * GB


def test_less_than_saved_prompts_need_is_refused_with_what_would_do() -> None:
    with pytest.raises(BudgetError, match="--prefix-cache-memory") as refusal:
        make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB, prefix_bytes=1)
    named = parse_size(str(refusal.value).split("at least ")[1].split(",")[0])
    make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB, prefix_bytes=named)


def test_the_smallest_budget_leaves_saved_prompts_the_least() -> None:
    minimum = make_plan(GLM, 100 * GB, 32_768, physical_bytes=128 * GB).minimum_budget_bytes
    plan = make_plan(GLM, minimum, 32_768, physical_bytes=128 * GB)
    assert plan.lines["prefix cache"] == 2048 * 95_232
