"""What a checkpoint's config.json and headers say, before anything is computed with them.

Called by loading, by the converter, and by the HTTP process, which has no MLX.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from config.errors import CheckpointError
from models.args import ModelArgs
from models.families import described_families, find_family
from models.loading.checkpoint_names import is_complete, plain_names
from streaming.files.headers import TensorEntry, read_headers

# Where models of images and text keep the config of their language model.
_INNER = ("text_config", "language_config", "llm_config")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model that is computed here; others are refused with what would be right."""
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    config = _language_config(config) if isinstance(config, dict) else {}
    if find_family(kind := config.get("model_type")) is None:
        raise CheckpointError(
            f"{directory} holds a model of type {kind!r}; glmserve runs {described_families()}"
        )
    return config


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, with what is said outside of it where it is silent."""
    inner: dict[str, Any] = next((config[name] for name in _INNER if isinstance(config.get(name), dict)), {})
    kind = inner.get("model_type") or config.get("model_type")
    if not inner or find_family(kind) is None:
        return config
    said = {name: value for name, value in inner.items() if value is not None}
    return {
        **{name: value for name, value in config.items() if name not in _INNER},
        **said,
        "model_type": kind,
    }


def read_tensors(directory: Path, args: ModelArgs) -> dict[str, TensorEntry]:
    """The tensors of the language model by the names that it gives them.

    Each entry keeps the name under which its file has it. CheckpointError names the file at fault.
    """
    return plain_names(read_headers(directory, partial(is_complete, args=args)), args)
