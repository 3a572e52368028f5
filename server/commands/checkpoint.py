"""Finds the folder of a checkpoint and checks that all of it is there, before anything is loaded.

Called by the command line. Reads headers only; knows nothing of what the tensors mean.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.errors import CheckpointError
from models.families import FAMILIES, find_family, parse_args
from models.family import Family
from models.loading.checkpoint_tensors import read_config, read_tensors
from models.loading.vendor_formats import refuse_vendor_format
from models.pocket import FOLDER
from server.commands.hub_cache import cache_folder, cached_repos, find_snapshot, parse_repo, snapshot_of
from streaming.files.headers import FP8, TensorEntry, read_headers

# Pocket is a toy: it must never answer to the name of the real model unless somebody says so.
POCKET_ID = "glmserve/pocket"
POCKET = FOLDER
SUGGESTED = "avlp12/GLM-5.2-Alis-MLX-Dynamic-3.5bpw"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint, the id that clients see by default, and why it was chosen."""

    directory: Path
    model_id: str
    remark: str = ""


def choose_checkpoint(path_or_repo: str | None, *, needs_glm: bool = False) -> FoundCheckpoint:
    """The checkpoint that the user named, else a GLM in the local Hugging Face cache, else Pocket.

    `needs_glm`: Pocket is not what is wanted, so that a name has to be given for it.
    """
    if path_or_repo is not None:
        directory = find_checkpoint(path_or_repo)
        is_pocket = directory.resolve() == POCKET.resolve()
        return FoundCheckpoint(directory, POCKET_ID if is_pocket else default_id(directory))
    if path_or_repo is None and needs_glm and next(_cached_glms(), None) is None:
        raise CheckpointError(
            f"--stream-experts is for GLM-5.2, and {_what_is_missing()}; to try this program with the small "
            f"model in the box, leave --stream-experts out, or add --model {POCKET}"
        )
    for directory in _cached_glms():
        remark = f"no --model given: serving {directory}, found in the Hugging Face cache"
        return FoundCheckpoint(directory, default_id(directory), remark)
    remark = f"no --model given: serving Pocket, a small demonstration model, since {_what_is_missing()}"
    return FoundCheckpoint(find_checkpoint(str(POCKET)), POCKET_ID, remark)


def family_of_folder(directory: Path) -> Family:
    """The architecture of a checkpoint; the first of all where its config says nothing that can be read."""
    try:
        found = find_family(read_config(directory).get("model_type"))
    except CheckpointError:  # the engine says what is wrong with it
        found = None
    return found or FAMILIES[0]


def default_id(directory: Path) -> str:
    """The id under which a checkpoint is served unless another one is given."""
    return family_of_folder(directory).served_id


def _what_is_missing() -> str:
    """Why there is no GLM in the cache, and what to do; a repository that is half there is named."""
    for folder in cached_repos():
        snapshot = snapshot_of(folder)
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        if snapshot and _is_half_a_glm(snapshot):
            found = f"{repo} in the Hugging Face cache is incomplete"
            return f"{found}: `glmserve pull {repo}` goes on, as `hf download` would"
    return (
        f"there is no GLM in the Hugging Face cache ({cache_folder()}): `glmserve pull {SUGGESTED}` fetches "
        f"one, as `hf download` does, and `glmserve pull --list` knows others"
    )


def _is_half_a_glm(snapshot: Path) -> bool:
    try:
        config = read_config(snapshot)
        read_tensors(snapshot, parse_args(config))
    except CheckpointError:
        return (snapshot / "config.json").exists() and _names_a_family(_text_of(snapshot / "config.json"))
    return False


def _names_a_family(text: str) -> bool:
    return any(f'"{kind}"' in text for family in FAMILIES for kind in family.model_types)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def find_checkpoint(path_or_repo: str) -> Path:
    """The complete checkpoint that the user means. Never downloads."""
    # os.path's questions, and not Path's: what may not be looked at, or has no possible name, is not there.
    path, repo = Path(os.path.expanduser(path_or_repo)), None
    is_gguf = path.suffix.lower() == ".gguf" or (os.path.isdir(path) and any(path.glob("*.gguf")))
    if not is_gguf and not os.path.exists(path) and (repo := parse_repo(path_or_repo)):
        path = _find_in_cache(*repo)
    if is_gguf:
        raise CheckpointError(
            f"--model {path}: GGUF cannot be served here; take a folder in MLX's format, such as that of "
            "mlx-community/GLM-5.2-mxfp4"
        )
    if os.path.isfile(path):
        raise CheckpointError(f"--model {path} is a file; give the folder with config.json and *.safetensors")
    if not os.path.isdir(path):
        raise CheckpointError(f"--model {path_or_repo}: there is no such folder, or it may not be read")
    if not os.path.exists(path / "config.json"):
        raise CheckpointError(f"--model {path}: no config.json there, so this is not a checkpoint")
    try:
        _read_tensors(path)
    except CheckpointError as error:
        if repo is None:
            raise
        raise CheckpointError(f"{error}; `glmserve pull {path_or_repo}` fetches what is missing") from error
    return path


def _find_in_cache(repo: str, revision: str | None) -> Path:
    snapshot = find_snapshot(repo, revision)
    if snapshot is None:
        at = f" --revision {revision}" if revision else ""
        name = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(
            f"--model {name} is neither a folder nor in the Hugging Face cache ({cache_folder()}); fetch it "
            f"with `glmserve pull {name}` or `hf download {repo}{at}`"
        )
    return snapshot


def _cached_glms() -> Iterator[Path]:
    """Complete checkpoints of our model type by name, those in FP8 last: they must be converted first."""
    only_convert = []
    for folder in cached_repos():
        snapshot = snapshot_of(folder)
        dtypes = _dtypes_of_glm(snapshot) if snapshot else None
        if snapshot is None or dtypes is None:
            continue
        if FP8 in dtypes:
            only_convert.append(snapshot)
        else:
            yield snapshot
    yield from only_convert


def _dtypes_of_glm(snapshot: Path) -> set[str] | None:
    """Of the tensors; None where it is no complete checkpoint of our model type, in a format of our own."""
    try:
        config = read_config(snapshot)
        tensors = _read_tensors(snapshot)
        refuse_vendor_format(snapshot, config, tensors)
        return {entry.dtype for entry in tensors.values()}
    except CheckpointError:
        return None


def _read_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Headers of all tensors; those that the index lists where the config does not say which are needed."""
    try:
        args = parse_args(read_config(directory))
    except CheckpointError:  # the engine says what is wrong with it
        return read_headers(directory)
    return read_tensors(directory, args)
