"""Another budget for a model that is already open: which lines of the plan may change then.

Pure, as `config.plan`. Called by the engine when somebody gives it another budget under way.
"""

from dataclasses import replace

from config.errors import BudgetError
from config.plan import Geometry, MemoryPlan, divide, least_experts, round_up, slots_bytes
from config.sizes import format_size, physical_memory_bytes


def replan(
    geometry: Geometry, plan: MemoryPlan, budget_bytes: int, *, physical_bytes: int | None = None
) -> MemoryPlan:
    """The plan with which the model was opened, under another budget: the experts take the difference, and
    the workspace as much of it as larger banks need to move.

    What else the engine has made by its plan (caches, buffers, ring) stays. BudgetError names the smallest
    budget that works so. It is never below `plan.minimum_budget_bytes`, so that the engine can be started
    with any budget that was taken.
    """
    physical = physical_bytes or physical_memory_bytes()
    if budget_bytes > physical:
        raise BudgetError(
            f"a budget of {format_size(budget_bytes)} is above the memory of this machine: "
            f"{format_size(physical)}"
        )
    others = sum(nbytes for name, nbytes in plan.lines.items() if name not in ("experts", "workspace"))
    least = max(others + least_experts(geometry), plan.minimum_budget_bytes)
    if budget_bytes < least:
        raise BudgetError(
            f"a budget of {format_size(budget_bytes)} is too small: with the context, buffers and ring that "
            f"this engine was started with it needs {round_up(least)}; started again it would need "
            f"{round_up(plan.minimum_budget_bytes)}"
        )
    workspace, slots = divide(geometry, budget_bytes - others)
    return replace(
        plan,
        budget_bytes=budget_bytes,
        lines={**plan.lines, "workspace": workspace, "experts": slots_bytes(geometry, slots)},
        slots_per_layer=slots,
    )
