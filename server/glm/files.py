"""The small JSON files of a checkpoint. Called at start-up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import CheckpointError

# As a request may ask for; top_k is a count.
_RANGES = {
    "temperature": (0, 2), "top_p": (0, 1), "top_k": (-1, 2**31 - 1), "min_p": (0, 1),
    "repetition_penalty": (0.01, 2),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that names no value gets."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def load_sampling_defaults(checkpoint: Path) -> SamplingDefaults:
    """The publisher's recommendation in generation_config.json.

    CheckpointError for what nothing can be sampled with: every request without values of its own would fail.
    """
    path = checkpoint / "generation_config.json"
    values = read_json(path)
    if values.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    known = {name: values[name] for name in _RANGES if values.get(name) is not None}
    for name, value in known.items():
        low, high = _RANGES[name]
        is_number = type(value) is int or (type(value) is float and name != "top_k")
        if not (is_number and low <= value <= high):
            raise CheckpointError(f"{path}: {name} {value!r} is no number from {low} to {high}")
    return SamplingDefaults(**known)
