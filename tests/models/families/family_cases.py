"""For each family its tiny checkpoints, its reference and its mutants: what the shared suite runs over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.models.families.flash_mutants import FLASH_MUTANTS
from tests.models.families.flash_reference import flash_reference, flash_reference_logits
from tests.models.families.tiny_flash import FLASH, FLASH_SCHEDULES, make_flash_weights
from tests.models.make_golden import reference_logits, reference_model
from tests.models.mutants import MUTANTS, Plant
from tests.tiny_glm import SCHEDULES, SHARED, WIDER, Array, make_weights

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One family. `planted_in`: the schedule in which every mutant shows; `wide`: rows that can be packed."""

    schedules: dict[str, Config]
    planted_in: str
    wide: Config
    make_weights: Callable[[Config, int], dict[str, Array]]
    make_reference: Callable[[Config, dict[str, Array]], Any]
    reference_logits: Callable[[Any, list[int]], Array]
    mutants: Sequence[Plant]


CASES = {
    "glm_moe_dsa": Case(SCHEDULES, "shared", WIDER, make_weights, reference_model, reference_logits, MUTANTS),
    "glm5_next": Case(
        FLASH_SCHEDULES,
        "sparse_first",
        FLASH | {k: WIDER[k] for k in WIDER if WIDER[k] != SHARED[k]},
        make_flash_weights,
        flash_reference,
        flash_reference_logits,
        FLASH_MUTANTS,
    ),
}
