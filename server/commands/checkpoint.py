"""Finds the folder of a checkpoint and checks that all of it is there, before anything is loaded.

Called by the command line. Reads headers only; knows nothing of what the tensors mean.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.errors import CheckpointError
from models.args import MODEL_TYPE
from models.pocket import FOLDER
from streaming.files.headers import FP8, read_headers

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
GLM_ID = "z-ai/glm-5.2"
# Pocket is a toy: it must never answer to the name of the real model unless somebody says so.
POCKET_ID = "glmserve/pocket"
POCKET = FOLDER


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint, the id that clients see by default, and why it was chosen."""

    directory: Path
    model_id: str
    remark: str = ""


def choose_checkpoint(path_or_repo: str | None) -> FoundCheckpoint:
    """The checkpoint that the user named, else a GLM in the local Hugging Face cache, else Pocket."""
    if path_or_repo is not None:
        directory = find_checkpoint(path_or_repo)
        return FoundCheckpoint(directory, POCKET_ID if directory.resolve() == POCKET.resolve() else GLM_ID)
    for directory in _cached_glms():
        remark = f"no --model given: serving {directory}, found in the Hugging Face cache"
        return FoundCheckpoint(directory, GLM_ID, remark)
    remark = (
        "no --model given and no GLM in the Hugging Face cache: serving Pocket, a small demonstration model. "
        "For the real one: hf download mlx-community/GLM-5.2-mxfp4, then glmserve --model "
        "mlx-community/GLM-5.2-mxfp4 --stream-experts"
    )
    return FoundCheckpoint(find_checkpoint(str(POCKET)), POCKET_ID, remark)


def find_checkpoint(path_or_repo: str) -> Path:
    """The complete checkpoint that the user means. Never downloads."""
    # os.path's questions, and not Path's: what may not be looked at, or has no possible name, is not there.
    path = Path(os.path.expanduser(path_or_repo))
    if not os.path.exists(path) and REPO_ID.fullmatch(path_or_repo):
        path = _find_in_cache(path_or_repo)
    if not os.path.isdir(path):
        raise CheckpointError(f"--model {path_or_repo}: there is no such folder, or it may not be read")
    if not os.path.exists(path / "config.json"):
        raise CheckpointError(f"--model {path}: no config.json there, so this is not a checkpoint")
    read_headers(path)
    return path


def _find_in_cache(repo: str) -> Path:
    snapshot = _snapshot(_cache_folder() / f"models--{repo.replace('/', '--')}")
    if snapshot is None:
        raise CheckpointError(
            f"--model {repo} is neither a folder nor in the Hugging Face cache; "
            f"fetch it with `hf download {repo}`"
        )
    return snapshot


def _cached_glms() -> Iterator[Path]:
    """Complete checkpoints of our model type by name, those in FP8 last: they must be converted first."""
    only_convert = []
    for folder in sorted(_cache_folder().glob("models--*")):
        snapshot = _snapshot(folder)
        dtypes = _dtypes_of_glm(snapshot) if snapshot else None
        if snapshot is None or dtypes is None:
            continue
        if FP8 in dtypes:
            only_convert.append(snapshot)
        else:
            yield snapshot
    yield from only_convert


def _dtypes_of_glm(snapshot: Path) -> set[str] | None:
    """Of the tensors; None where it is no complete checkpoint of our model type."""
    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
            return None
        return {entry.dtype for entry in read_headers(snapshot).values()}
    except (OSError, ValueError, RecursionError, CheckpointError):
        return None


def _snapshot(folder: Path) -> Path | None:
    """Of the main revision; None where there is none, or none that may be read."""
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        revision = "main"
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if revision and os.path.isdir(snapshot) else None


def _cache_folder() -> Path:
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home) / "hub"
