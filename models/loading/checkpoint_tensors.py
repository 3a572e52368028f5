"""What a checkpoint's config.json and headers say, before anything is computed with them.

Called by loading, by the converter, and by the HTTP process, which has no MLX.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from config.errors import CheckpointError
from models.args import MODEL_TYPE, ModelArgs
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
    if not isinstance(config, dict) or (config := _language_config(config)).get("model_type") != MODEL_TYPE:
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{directory} holds a model of type {kind!r}; glmserve runs GLM-5, 5.1, 5.2 and 5.3, "
            f"whose type is {MODEL_TYPE!r}"
        )
    return config


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, with what is said outside of it where it is silent."""
    inner: dict[str, Any] = next((config[name] for name in _INNER if isinstance(config.get(name), dict)), {})
    kind = inner.get("model_type") or config.get("model_type")
    if not inner or kind != MODEL_TYPE:
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
    return plain_names(read_headers(directory, partial(is_complete, args=args)))
