"""The small JSON files of a checkpoint. Called at start-up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import CheckpointError


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def load_sampling_defaults(checkpoint: Path) -> SamplingDefaults:
    """The publisher's recommendation in generation_config.json."""
    values = read_json(checkpoint / "generation_config.json")
    if values.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    known = {
        name: values[name] for name in SamplingDefaults.__dataclass_fields__ if values.get(name) is not None
    }
    return SamplingDefaults(**known)
