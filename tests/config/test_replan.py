import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import BudgetError
from config.plan import make_plan
from config.replan import replan
from config.sizes import parse_size
from tests.config.test_plan import GB, GLM

PHYSICAL = 128 * GB
PLAN = make_plan(GLM, 100 * GB, 32_768, reader_threads=4, physical_bytes=PHYSICAL)


@given(budget=st.integers(0, 130 * GB))
def test_only_the_experts_change_and_what_is_taken_can_be_started_with(budget: int) -> None:
    try:
        plan = replan(GLM, PLAN, budget, physical_bytes=PHYSICAL)
    except BudgetError:
        assert budget > PHYSICAL or budget < PLAN.minimum_budget_bytes + sum(PLAN.lines.values())
        return
    assert sum(plan.lines.values()) <= plan.budget_bytes == budget
    assert min(plan.slots_per_layer) >= GLM.experts_per_token
    others = {name: nbytes for name, nbytes in plan.lines.items() if name != "experts"}
    assert others.items() <= PLAN.lines.items()
    make_plan(GLM, budget, 32_768, physical_bytes=PHYSICAL)


def test_larger_banks_get_the_room_to_move() -> None:
    physical = 512 * GB
    plan = replan(GLM, PLAN, 300 * GB, physical_bytes=physical)
    assert plan.lines["workspace"] == max(plan.slots_per_layer) * 16_515_072 > GLM.workspace_bytes
    assert 300 * GB - 2 * 16_515_072 < sum(plan.lines.values()) <= 300 * GB
    assert replan(GLM, plan, 100 * GB, physical_bytes=physical) == PLAN


def test_the_same_budget_is_the_same_plan() -> None:
    assert replan(GLM, PLAN, 100 * GB, physical_bytes=PHYSICAL) == PLAN


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(BudgetError, match=r"200\.0 GB is above the memory of this machine: 128\.0 GB"):
        replan(GLM, PLAN, 200 * GB, physical_bytes=PHYSICAL)
    with pytest.raises(BudgetError, match="is too small") as refusal:
        replan(GLM, PLAN, 20 * GB, physical_bytes=PHYSICAL)
    found = re.search(r"it needs (\S+); started again it would need (\S+)$", str(refusal.value))
    assert found
    running, started = map(parse_size, found.groups())
    assert min(replan(GLM, PLAN, running, physical_bytes=PHYSICAL).slots_per_layer) == 8
    assert started < running
    make_plan(GLM, started, 32_768, physical_bytes=PHYSICAL)


def test_a_budget_with_which_no_engine_could_be_started_again_is_refused() -> None:
    """Fewer threads than a start sets buffers aside for: what they leave over must not count."""
    least = PLAN.minimum_budget_bytes
    small = make_plan(GLM, least, 32_768, reader_threads=1, physical_bytes=PHYSICAL)
    assert replan(GLM, small, least, physical_bytes=PHYSICAL) == small
    with pytest.raises(BudgetError, match="is too small"):
        replan(GLM, small, least - 1, physical_bytes=PHYSICAL)
