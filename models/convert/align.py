"""Rewrites a checkpoint so that an expert is one read: its parts side by side, from a page boundary on.

Called by the command `glmserve align`. In place it goes file by file: a new file is written, read back and
named, then the index that knows it replaces the old one, then old shards that no tensor needs any more go. So
the index names one complete copy at any moment, and a run that was cut goes on.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from config.errors import CheckpointError, UsageError
from config.sizes import format_size
from models.convert.align_plan import plan_steps
from models.convert.aligned_shard import PARTIAL, read_metadata, replace_file, sync_folder, write_shard
from models.families import parse_args
from models.loading.checkpoint_names import is_complete, unwrapped
from models.loading.checkpoint_tensors import read_config
from models.loading.vendor_formats import refuse_vendor_format
from streaming.files.headers import INDEX_NAME, TensorEntry, read_headers
from streaming.files.in_use import sole_use
from streaming.files.index import ExpertIndex

STATE_NAME = "align.json"
# Room for headers, and for what the file system itself needs.
SPARE_BYTES = 64 * 10**6

Progress = Callable[[int, int], None]
Tensors = Mapping[str, TensorEntry]


def align(
    directory: Path, target: Path | None = None, on_progress: Progress = lambda done, total: None
) -> int:
    """Aligns a checkpoint in place, or into another folder; returns how many bytes were written.

    `on_progress` hears bytes done, of how many. UsageError or CheckpointError says why it is refused, with
    the folder as it was, or why it stopped; the same command then goes on.
    """
    try:
        with sole_use(directory):
            tensors, index = _open(directory)
            if target is not None:
                return _align_elsewhere(directory, target, tensors, index, on_progress)
            _check_links(directory, tensors)
            return _InPlace(directory, tensors, index).run(on_progress)
    except OSError as error:
        raise UsageError(
            f"{error.filename or directory}: {error.strerror}; repeat the command to go on"
        ) from error


def _open(directory: Path) -> tuple[Tensors, ExpertIndex]:
    """All tensors by the names that their files have, and where the experts lie."""
    config = read_config(directory)
    args = parse_args(config)
    tensors = read_headers(directory, partial(is_complete, args=args))
    refuse_vendor_format(directory, config, tensors)
    plain = unwrapped(tensors)
    if not is_complete(plain, args):
        raise CheckpointError(f"{directory} is not a complete model; finish the download")
    return tensors, ExpertIndex.from_entries(plain, args.num_hidden_layers)


def _check_links(directory: Path, tensors: Tensors) -> None:
    """UsageError for files that others share: those of the Hugging Face cache are links to its blobs."""
    is_cache = directory.parent.name == "snapshots" and (directory.parents[1] / "refs").exists()
    if is_cache or any(entry.path.is_symlink() for entry in tensors.values()):
        raise UsageError(
            f"{directory} holds links to files that others share, as the Hugging Face cache does, and those "
            f"are never rewritten; name a folder for the aligned copy: glmserve align {directory} DST"
        )


class _InPlace:
    """One run in a folder; `_weight_map` is the index that stands there."""

    def __init__(self, directory: Path, tensors: Tensors, index: ExpertIndex) -> None:
        self._directory = directory
        self._weight_map = {name: entry.path.name for name, entry in tensors.items()}
        self._steps = list(plan_steps(tensors, index))

    def run(self, on_progress: Progress) -> int:
        """Writes what is missing; returns how many bytes that was."""
        _remove_partials(self._directory)
        self._remove_old()
        total, done = sum(step.nbytes for step in self._steps), 0

        def copied(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            on_progress(done, total)

        if self._steps:
            _check_space(self._directory, self._most_bytes())
            self._commit(self._weight_map)  # a folder may have none, or one that is wrong
        for step in self._steps:
            metadata = read_metadata(step.copies[0].path)
            write_shard(self._directory / step.name, step.copies, metadata, copied)
            self._commit(step.applied_to(self._weight_map))
            self._remove_old()
        (self._directory / STATE_NAME).unlink(missing_ok=True)
        return total

    def _commit(self, weight_map: dict[str, str]) -> None:
        """Another index takes effect, at once. What it does not name may be removed from then on."""
        old = sorted(set(self._weight_map.values()) - set(weight_map.values()))
        replace_file(self._directory / STATE_NAME, json.dumps({"old": old}))
        replace_file(self._directory / INDEX_NAME, _index_text(self._directory, weight_map))
        self._weight_map = weight_map

    def _remove_old(self) -> None:
        """Removes shards that this or an earlier run has emptied, if the index does not name them."""
        old = _read_json(self._directory / STATE_NAME).get("old", [])
        for name in set(old) - set(self._weight_map.values()):
            (self._directory / name).unlink(missing_ok=True)
        sync_folder(self._directory)

    def _most_bytes(self) -> int:
        """What is taken beside the present files, at most, while old shards go one after another."""
        weight_map, more, most = self._weight_map, 0, 0
        for step in self._steps:
            following = step.applied_to(weight_map)
            more += step.nbytes
            most = max(most, more)
            gone = set(weight_map.values()) - set(following.values())
            more -= sum((self._directory / name).stat().st_size for name in gone)
            weight_map = following
        return most


def _align_elsewhere(
    directory: Path, target: Path, tensors: Tensors, index: ExpertIndex, on_progress: Progress
) -> int:
    """Writes an aligned copy; the folder counts as complete once its index is there."""
    stamps = {entry.path.name: entry.stamp for entry in tensors.values()}
    files = {name: [stamp.num_bytes, stamp.modified_ns] for name, stamp in sorted(stamps.items())}
    _begin(target, {"source": str(directory.resolve()), "files": files})
    _remove_partials(target)
    steps = list(plan_steps(tensors, index))
    weight_map = {name: entry.path.name for name, entry in tensors.items()}
    for step in steps:
        weight_map = step.applied_to(weight_map)
    kept = {directory / name for name in weight_map.values()}
    whole = sorted(kept & {entry.path for entry in tensors.values()})
    missing = [step for step in steps if not (target / step.name).exists()]
    others = [path for path in whole if not (target / path.name).exists()]
    total = sum(step.nbytes for step in missing) + sum(path.stat().st_size for path in others)
    _check_space(target, total)
    done = 0

    def copied(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total)

    for step in missing:
        write_shard(target / step.name, step.copies, read_metadata(step.copies[0].path), copied)
    for path in others:
        _copy_whole(path, target / path.name)
        copied(path.stat().st_size)
    _copy_descriptions(directory, target)
    replace_file(target / INDEX_NAME, _index_text(directory, weight_map))
    (target / STATE_NAME).unlink()
    return total


def _begin(target: Path, state: dict[str, Any]) -> None:
    """Begins a new folder, or goes on with one that this very copy began; anything else is left alone."""
    path = target / STATE_NAME
    if path.exists() and _read_json(path) in (state, {}):
        replace_file(path, json.dumps(state))
        return
    begun = path.with_name(path.name + PARTIAL)  # cut before it had its name
    if target.exists() and (not target.is_dir() or any(other != begun for other in target.iterdir())):
        raise UsageError(f"{target} exists and is no unfinished copy of this checkpoint; use another folder")
    target.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(state))


def _copy_whole(path: Path, target: Path) -> None:
    partial_path = target.with_name(target.name + PARTIAL)
    shutil.copyfile(path, partial_path)
    partial_path.replace(target)


def _copy_descriptions(directory: Path, target: Path) -> None:
    """Everything of a checkpoint that is no weight: configs, tokenizer, templates, licence."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.suffix not in (".safetensors", PARTIAL) and path.name != INDEX_NAME:
            _copy_whole(path, target / path.name)


def _index_text(directory: Path, weight_map: Mapping[str, str]) -> str:
    metadata = _read_json(directory / INDEX_NAME).get("metadata") or {}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=1)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, or one that was cut."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _remove_partials(directory: Path) -> None:
    for path in [*directory.glob(f"model*{PARTIAL}"), directory / f"{STATE_NAME}{PARTIAL}"]:
        path.unlink(missing_ok=True)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed + SPARE_BYTES > free:
        raise UsageError(
            f"{directory}: {format_size(needed)} are needed beside what is there, the disk has "
            f"{format_size(free)} free; nothing was changed"
        )
