"""Safetensors headers, read without touching a tensor.

Owns nothing. Called at start-up by the expert index, by the trunk loader and by the converter. It is our own
parser because the usual ones hand out lazy arrays: gathering from a lazy expert stack materialises all of it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from config.errors import CheckpointError

# Weights of originals in eight bits, which are converted and not served.
FP8 = "F8_E4M3"
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
SHARDS = "model*.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The bound of the format's reference implementation: a longer header is a damaged length field.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class FileStamp:
    """What a file was at start-up; a file that no longer matches was replaced under us."""

    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileStamp":
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)

    @classmethod
    def from_path(cls, path: Path) -> "FileStamp":
        return cls.from_stat(path.stat())


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place: `offset` counts from the start of the file at `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: FileStamp


IsComplete = Callable[[Collection[str]], bool]


def read_headers(directory: Path, is_complete: IsComplete | None = None) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name; CheckpointError names the file and the tensor at fault.

    The index says which files count, and of a tensor in several of them which one. Where `is_complete` is
    given, a complete index says which tensors count, and one that is wrong gives way to complete files.
    """
    fault: CheckpointError | None = None
    entries: dict[str, TensorEntry] = {}
    weight_map: dict[str, str] | None = {}
    try:
        weight_map = _read_weight_map(directory / INDEX_NAME)
        entries = (
            _read_files(_shards(directory)) if weight_map is None else _read_indexed(directory, weight_map)
        )
    except CheckpointError as error:
        fault = error
    if is_complete and weight_map is not None:
        listed = {name: entry for name, entry in entries.items() if name in weight_map}
        if listed and is_complete(listed):
            return listed
        if not is_complete(entries):
            entries = _read_unindexed(directory, set(weight_map.values()), entries, is_complete) or entries
    if fault and not entries:
        raise fault
    return entries


def _read_indexed(directory: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    """What the index lists, and what else is in the files that it names."""
    paths = [directory / shard for shard in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not os.path.isfile(path)]  # any error means no
    if missing or not paths:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(paths)} files: {_some(missing)}; finish the download"
        )
    entries = _read_files(paths, {name: Path(shard).name for name, shard in weight_map.items()})
    for name, shard in weight_map.items():
        if name not in entries or entries[name].path.name != Path(shard).name:
            raise CheckpointError(f"{directory / INDEX_NAME}: tensor {name} should be in {shard} and is not")
    return entries


def _read_unindexed(
    directory: Path, known: Collection[str], indexed: Mapping[str, TensorEntry], is_complete: IsComplete
) -> dict[str, TensorEntry] | None:
    """The tensors of a folder whose index does not know them all; None where that makes no whole checkpoint.

    First the files beside those `known` to the index, as the rest of what it lists or alone, then all files.
    """
    paths = sorted(directory.glob(SHARDS))
    with contextlib.suppress(CheckpointError):
        others = _read_files([path for path in paths if path.name not in known])
        if not others.keys() & indexed.keys() and is_complete(both := {**indexed, **others}):
            return both
        if is_complete(others):
            return others
    with contextlib.suppress(CheckpointError):
        if is_complete(everything := _read_files(paths)):
            return everything
    return None


def _read_files(paths: Sequence[Path], owners: Mapping[str, str] | None = None) -> dict[str, TensorEntry]:
    """The tensors of these files. `owners` names the file that counts for a tensor which several have."""
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        for entry in read_header(path):
            before = entries.get(entry.name)
            owner = (owners or {}).get(entry.name)
            if before is None or path.name == owner:
                entries[entry.name] = entry
            elif before.path.name != owner:
                raise CheckpointError(f"{path}: tensor {entry.name} is also in {before.path.name}")
    return entries


def _shards(directory: Path) -> list[Path]:
    paths = sorted(directory.glob(SHARDS))
    if not paths:
        raise CheckpointError(f"{directory} holds no {SHARDS} files")
    return paths


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file, in order of their offsets."""
    try:
        with open(path, "rb") as file:
            stamp = FileStamp.from_stat(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            if stamp.num_bytes < 8 or length > min(stamp.num_bytes - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, the file has {stamp.num_bytes}; "
                    "it is damaged or not fully downloaded"
                )
            header = _parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, name, value, 8 + length, stamp) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for before, after in pairwise(entries):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: tensors {before.name} and {after.name} overlap")
    return entries


def _parse_entry(path: Path, name: str, value: Any, data_start: int, stamp: FileStamp) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is described by {value!r} instead of an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has a shape or offsets that make no sense: {shape!r}, {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if nbytes != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{where} of {dtype} {shape} needs {prod(shape) * ITEM_BYTES[dtype]} bytes, not {nbytes}"
        )
    if data_start + offsets[1] > stamp.num_bytes:
        raise CheckpointError(
            f"{where} ends at byte {data_start + offsets[1]}, the file has {stamp.num_bytes}; "
            "it is truncated or not fully downloaded"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes, stamp)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Bounded, because a product of what a damaged header claims may have more digits than Python prints."""
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """Tensor names to file names; None without an index."""
    if not os.path.exists(path):  # nor where it may not be looked for
        return None
    try:
        document = _parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: it has no weight_map of tensor names to file names")
    return weight_map


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be parsed: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its JSON is not an object")
    return document


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
