"""The memory plan written out, for people and for programs. Called by the command line and by the engine."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from config.plan import MemoryPlan, round_up
from config.sizes import format_size


def as_dict(plan: MemoryPlan) -> dict[str, object]:
    """The plan for programs."""
    return {
        "budget_bytes": plan.budget_bytes,
        "minimum_budget_bytes": plan.minimum_budget_bytes,
        "resident_bytes": plan.resident_bytes,
        "max_context": plan.max_context,
        "lines": dict(plan.lines),
        "unassigned_bytes": plan.budget_bytes - sum(plan.lines.values()),
        "slots_per_layer": list(plan.slots_per_layer),
        "num_experts": plan.num_experts,
        "is_resident": plan.is_resident,
        "sweep_tokens": plan.sweep_tokens,
        "ring_slots": plan.ring_slots,
    }


def render_plan(plan: MemoryPlan) -> str:
    """The plan for people."""
    table = Table(
        title=f"A budget of {format_size(plan.budget_bytes)}, a context of {plan.max_context} tokens"
    )
    table.add_column("line")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    unassigned = plan.budget_bytes - sum(plan.lines.values())
    for name, nbytes in {**plan.lines, "unassigned": unassigned}.items():
        table.add_row(name, format_size(nbytes), f"{nbytes / plan.budget_bytes:.1%}")
    low, high = min(plan.slots_per_layer, default=0), max(plan.slots_per_layer, default=0)
    slots = str(low) if low == high else f"{low} to {high}"
    out = StringIO()
    console = Console(file=out, width=80)
    console.print(table)
    console.print(f"{slots} of {plan.num_experts} experts of each layer stay in memory.")
    console.print(f"A sweep of the experts serves up to {plan.sweep_tokens} tokens of prompts.")
    console.print(f"The smallest budget that works is {round_up(plan.minimum_budget_bytes)};")
    console.print(f"with {round_up(plan.resident_bytes)} every expert stays in memory.")
    return out.getvalue()
