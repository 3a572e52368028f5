"""What a plan is expected to give: tokens a second, and the time to a first token. Pure.

One source for `glmserve plan`, the lines at the start, `doctor` and docs/performance.md. What the product
makes of a machine (how often experts are found, what reading ahead hides, what agents share) was played by
`benchmarks.simulator` with the product's own code; what a machine can do are constants, each with its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from config.plan import Geometry, MemoryPlan
from config.sizes import format_size

# What LRU finds of a token's experts, by the share of all that lies in memory: routings of the published
# locality through the product's books. Published are 60 % at 0.18 (mlx-lm #1438), 68 to 74 % at 0.2 to 0.28
# (colibri #387, #537).
HITS = ((0.0, 0.0), (1 / 32, 0.43), (1 / 16, 0.53), (1 / 8, 0.605), (1 / 4, 0.67), (1 / 2, 0.78), (1.0, 1.0))
# Where n agents write, what is found falls by n to this power, less where there is room for all.
AGENTS_EXPONENT = 0.19
# While a step reads so much of its computing goes on, and while it computes so much of what it reads arrives.
COMPUTING_HIDDEN, READING_HIDDEN, SWEEP_HIDDEN = 0.6, 0.95, 0.95
PROMPT_TOKENS = 1000
# Of a context, whatever its length, a row attends to so many tokens: GLM-5.2's `index_topk`.
ATTENDED_TOKENS = 2048


@dataclass(frozen=True)
class Machine:
    """What a machine can do, with the source of each figure in `MACHINES`.

    `layer_s`: what a sparse layer takes beside its bytes, one synchronisation with it. `copy_bytes_per_s`:
    from the host's memory into the slots, where that is a copy. `prompt_bytes_per_s`: rows of a prompt
    times the bytes of weights that each needs, a second.
    """

    memory_bytes_per_s: float
    layer_s: float
    prompt_bytes_per_s: float
    error: str
    copy_bytes_per_s: float = 1e12


# By the name of the arithmetic. metal: an M5 Max, 614 GB/s of which four fifths are had; a layer by colibri's
# and gmlx's accounts; prompts as 94 tokens/s of two machines with experts of two bits (ds4 #651). cuda: one
# H200, GLM-5.2's 78 layers, and 7,918 tokens/s of six layers (benchmarks/notes.md). cpu: two cores, weights
# of two bits (docs/rehearsal.md).
MACHINES: Mapping[str, Machine] = {
    "metal": Machine(490e9, 0.001, 1.1e12, "about 20 %"),
    "cuda": Machine(3.2e12, 0.0025, 13e12, "about 20 %", 16.3e9),
    "cpu": Machine(0.2e9, 0.0, 6e9, "a factor of two"),
}
# 819 GB/s, and 190 tokens/s of a prompt with experts of four bits (omlx #3006).
M3_ULTRA = Machine(655e9, 0.001, 4.3e12, "about 20 %")
# Of Macs only those called Ultra have more.
MOST_OF_A_MAX = 160 * 10**9


def machine_with(arithmetic: str, memory_bytes: int) -> Machine:
    """The constants of a machine, by what computes there and how much memory it has."""
    is_ultra = arithmetic == "metal" and memory_bytes > MOST_OF_A_MAX
    return M3_ULTRA if is_ultra else MACHINES[arithmetic]


@dataclass(frozen=True)
class Forecast:
    """What `agents` together get, and when a prompt of `prompt` tokens, none of it saved, has its first."""

    tokens_per_s: float
    first_token_s: float
    hit_rate: float
    bytes_per_token: int  # read from the disk
    agents: int
    context: int
    prompt: int
    error: str

    def describe(self) -> str:
        """In one line."""
        return (
            f"about {self.tokens_per_s:.1f} tokens/s for one agent ({self.hit_rate:.0%} of the experts found "
            f"in memory, {format_size(self.bytes_per_token)} read for a token), "
            f"{self.first_token_s:.1f} s to the first token of a prompt of {self.prompt}; "
            f"computed, expected error {self.error}"
        )


def forecast(
    geometry: Geometry,
    plan: MemoryPlan,
    disk_bytes_per_s: float,
    machine: Machine = MACHINES["metal"],
    *,
    agents: int = 1,
    context: int = 0,
    prompt: int = PROMPT_TOKENS,
) -> Forecast:
    """What this plan gives with a disk that reads experts at this rate.

    `context`: tokens behind which each agent writes. The slots are the plan's, the same for all agents.
    """
    rate = min(disk_bytes_per_s, machine.copy_bytes_per_s)
    num_layers, expert_bytes = len(geometry.expert_bytes), sum(geometry.expert_bytes)
    share = sum(plan.slots_per_layer) / max(1, num_layers * geometry.num_experts)
    hit_rate = 1.0 if plan.is_resident else found(share, agents)
    wanted = _distinct(geometry, agents) * expert_bytes
    kept = (
        context * geometry.index_key_bytes_per_token
        + min(context, ATTENDED_TOKENS) * geometry.kv_bytes_per_token
    )
    computed_s = (geometry.trunk_bytes + wanted + agents * kept) / machine.memory_bytes_per_s
    computed_s += machine.layer_s * num_layers
    read_s = (1 - hit_rate) * wanted / rate
    step_s = computed_s + read_s - min(COMPUTING_HIDDEN * computed_s, READING_HIDDEN * read_s)
    return Forecast(
        agents / step_s,
        _first_token_s(geometry, plan, rate, machine, share, prompt),
        hit_rate,
        int((1 - hit_rate) * wanted / agents),
        agents,
        context,
        prompt,
        machine.error,
    )


def found(share: float, agents: int = 1) -> float:
    """What of the experts asked for lies in memory, where this share of all does."""
    for (low, less), (high, more) in pairwise(HITS):
        if share <= high:
            alone = less + (more - less) * (share - low) / (high - low)
            return alone / float(agents ** (AGENTS_EXPONENT * (1 - share) ** 2))
    return 1.0


def _distinct(geometry: Geometry, rows: int) -> float:
    """Experts of a layer that so many rows want, which choose independently."""
    if not geometry.num_experts:
        return 0.0
    return geometry.num_experts * (1 - (1 - geometry.experts_per_token / geometry.num_experts) ** rows)


def _first_token_s(
    geometry: Geometry, plan: MemoryPlan, rate: float, machine: Machine, share: float, prompt: int
) -> float:
    """One sweep for each `sweep_tokens` of the prompt, computed meanwhile."""
    expert_bytes = sum(geometry.expert_bytes)
    token_bytes = geometry.trunk_bytes + geometry.experts_per_token * expert_bytes
    computed_s = prompt * token_bytes / machine.prompt_bytes_per_s
    sweeps = -(-prompt // max(1, plan.sweep_tokens))
    read_s = sweeps * (1 - share) * _distinct(geometry, prompt) * expert_bytes / rate
    return max(computed_s, read_s) + (1 - SWEEP_HIDDEN) * min(computed_s, read_s)
