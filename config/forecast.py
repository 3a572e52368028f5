"""What a plan is expected to give: tokens a second, and the time to a first token. Pure.

The constants are published figures of M5 Max machines with 128 GB that stream GLM-5.2; on another machine the
disk's rate counts most, which is measured or given.
"""

from dataclasses import dataclass

from config.plan import Geometry, MemoryPlan
from config.sizes import format_size

# 68 to 74 % of the experts asked for were found with 28 % of all in memory (colibri #387 and #537).
HIT_EXPONENT = 0.27
# What a token reads in memory besides: the trunk and its experts, at 614 GB/s of which four fifths are had.
MEMORY_BYTES_PER_S = 490e9
# One synchronisation of a MoE layer with the GPU, and its launches (gmlx's accounts).
LAYER_S = 0.001
# Prompts are computed no faster than this: 94 tokens/s with experts of two bits in memory (ds4 #651), times
# the bytes that a token needs.
PROMPT_BYTES_PER_S = 1.1e12
PROMPT_TOKENS = 1000


@dataclass(frozen=True)
class Forecast:
    """For one agent alone; `first_token_s` is that of a prompt of `PROMPT_TOKENS`, none of it saved."""

    tokens_per_s: float
    first_token_s: float
    hit_rate: float
    bytes_per_token: int  # read from the disk

    def describe(self) -> str:
        """In one line."""
        return (
            f"about {self.tokens_per_s:.1f} tokens/s for one agent ({self.hit_rate:.0%} of the experts found "
            f"in memory, {format_size(self.bytes_per_token)} read for a token), "
            f"{self.first_token_s:.1f} s to the first token of a prompt of {PROMPT_TOKENS}"
        )


def forecast(geometry: Geometry, plan: MemoryPlan, disk_bytes_per_s: float) -> Forecast:
    """What this plan gives with a disk that reads experts at this rate."""
    num_layers = len(geometry.expert_bytes)
    share = sum(plan.slots_per_layer) / max(1, num_layers * geometry.num_experts)
    hit_rate = 1.0 if plan.is_resident else share**HIT_EXPONENT
    token_bytes = geometry.experts_per_token * sum(geometry.expert_bytes)
    read_bytes = int((1 - hit_rate) * token_bytes)
    computed_s = (geometry.trunk_bytes + token_bytes) / MEMORY_BYTES_PER_S + LAYER_S * num_layers
    swept_bytes = (1 - share) * geometry.num_experts * sum(geometry.expert_bytes)
    computed_prompt_s = PROMPT_TOKENS * (geometry.trunk_bytes + token_bytes) / PROMPT_BYTES_PER_S
    first_s = max(computed_prompt_s, swept_bytes / disk_bytes_per_s)
    return Forecast(1 / (read_bytes / disk_bytes_per_s + computed_s), first_s, hit_rate, read_bytes)
