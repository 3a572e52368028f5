"""Finds the folder of a checkpoint and checks that all of it is there, before anything is loaded.

Called by the command line. Reads headers only; knows nothing of what the tensors mean.
"""

import json
import os
import re
import struct
from pathlib import Path

from config.errors import CheckpointError
from config.sizes import format_size

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(path_or_repo: str) -> Path:
    """The complete checkpoint that the user means. Never downloads."""
    path = Path(path_or_repo).expanduser()
    if not path.exists() and REPO_ID.fullmatch(path_or_repo):
        path = _find_in_cache(path_or_repo)
    if not path.is_dir():
        raise CheckpointError(f"--model {path_or_repo}: there is no such folder")
    if not (path / "config.json").exists():
        raise CheckpointError(f"--model {path}: no config.json there, so this is not a checkpoint")
    _check_is_complete(path)
    return path


def _find_in_cache(repo: str) -> Path:
    folder = _cache_folder() / f"models--{repo.replace('/', '--')}"
    revision = folder / "refs" / "main"
    snapshot = folder / "snapshots" / (revision.read_text().strip() if revision.exists() else "main")
    if not snapshot.is_dir():
        raise CheckpointError(
            f"--model {repo} is neither a folder nor in the Hugging Face cache; "
            f"fetch it with `hf download {repo}`"
        )
    return snapshot


def _cache_folder() -> Path:
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home) / "hub"


def _check_is_complete(path: Path) -> None:
    shards = _shards(path)
    missing = [name for name in shards if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} weight files are missing, {missing[0]} first; "
            "finish the download"
        )
    for name in shards:
        _check_length(path / name)


def _shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{path}: no weights (*.safetensors) there; finish the download")
        return names
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error


def _check_length(shard: Path) -> None:
    try:
        num_expected = _expected_bytes(shard)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{shard} has no readable header; download it again") from error
    if (num_bytes := shard.stat().st_size) < num_expected:
        missing = format_size(num_expected - num_bytes)
        raise CheckpointError(f"{shard} is {missing} short; finish the download")


def _expected_bytes(shard: Path) -> int:
    """Length of a safetensors file by its header: 8 bytes, the header, the data."""
    with shard.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > shard.stat().st_size:
            return 8 + int(header_bytes)
        header = json.loads(file.read(header_bytes))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(header_bytes) + int(max(ends, default=0))
