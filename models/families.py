"""The architectures that are computed here. Another one is a folder and a line of `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from models.args import ModelArgs
from models.dsa_family import GLM_MOE_DSA
from models.family import Family
from models.glm5_next.flash_family import GLM5_NEXT

FAMILIES = (GLM_MOE_DSA, GLM5_NEXT)


def find_family(model_type: object) -> Family | None:
    """The architecture of this `model_type`, or None for one that is not computed here."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(args: ModelArgs) -> Family:
    """The architecture of parsed arguments."""
    family = find_family(args.model_type)
    assert family, "only families make arguments"
    return family


def parse_args(config: Mapping[str, Any]) -> ModelArgs:
    """The arguments of a config that `read_config` gave. Raises CheckpointError for what is not computed."""
    family = find_family(config.get("model_type"))
    assert family, "other types are refused when config.json is read"
    return family.parse(config)


def described_families() -> str:
    """What runs, for the refusal of what does not: names and types."""
    return " and ".join(f"{family.title} ({family.model_type!r})" for family in FAMILIES)
