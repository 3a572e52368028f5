"""The mixture: which task is drawn how often, and how long the long prompts are.

Owns the shares and the curriculum of lengths. `progress` runs from 0 to 1 over the training.
"""

from collections.abc import Callable

from training.pocket.data.arithmetic import arithmetic_sample, drill_sample
from training.pocket.data.chat import echo_sample, fact_sample, talk_sample, turns_sample
from training.pocket.data.needle import needle_sample
from training.pocket.data.pools import Pools
from training.pocket.data.sample import Sample
from training.pocket.data.structured import json_drill, json_sample
from training.pocket.data.tool_use import agent_sample, call_sample, no_call_sample, result_sample

CHARACTERS_PER_TOKEN = 2.72
LONGEST_PROMPT_TOKENS = 4200
ECHO_UNTIL = 0.25

SHORT_TASKS: tuple[tuple[Callable[[Pools], Sample], float], ...] = (
    (talk_sample, 0.04),
    (fact_sample, 0.06),
    (arithmetic_sample, 0.24),
    (drill_sample, 0.10),
    (json_sample, 0.14),
    (json_drill, 0.08),
    (call_sample, 0.22),
    (no_call_sample, 0.08),
    (result_sample, 0.07),
    (agent_sample, 0.04),
    (turns_sample, 0.06),
    (echo_sample, 0.06),
)


def long_share(progress: float) -> float:
    """Share of samples that are needles in filler: few at first and, once learnt, few again."""
    return 0.06 if 0.08 < progress < 0.6 else 0.03


def needle_tokens(pools: Pools, progress: float) -> int:
    """Length of a needle prompt: short at first, up to the longest from a fifth of the training on."""
    top = min(1.0, 0.08 + progress * 4.5) * LONGEST_PROMPT_TOKENS
    return int(pools.rng.uniform(0.03, 1.0) ** 1.8 * top) + 60


def draw_sample(pools: Pools, progress: float) -> Sample:
    """One training sample at this point of the training."""
    if pools.rng.random() < long_share(progress):
        tokens = needle_tokens(pools, progress)
        questions = pools.rng.choice((1, 2, 4, 6)) if tokens > 300 else 1
        return needle_sample(pools, int(tokens * CHARACTERS_PER_TOKEN), num_questions=questions)
    if progress < ECHO_UNTIL and pools.rng.random() < 0.12:
        return echo_sample(pools)
    makers, weights = zip(*SHORT_TASKS, strict=True)
    maker = pools.rng.choices(makers, weights)[0]
    return maker(pools)
