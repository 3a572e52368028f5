"""Makes a streamable checkpoint: Hugging Face BF16, F16, F32 or FP8 -> MLX's stacked, quantised layout.

Called by the command `glmserve convert`. One output file for each layer, written block by block: memory
stays below `PEAK_BYTES` beyond the libraries' own, whatever the size of the model. A finished file is never
touched again, so a conversion that was cut goes on where it stopped.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from config.errors import CheckpointError, UsageError
from config.sizes import format_size
from models.args import ModelArgs
from models.convert.recipe import Matrix, Recipe, group_by_layer, make_matrices, make_recipe
from models.convert.shards import ShardWriter, TensorSpec
from models.convert.source import Source, scale_name
from models.families import parse_args
from models.loading.building import check_dense
from models.loading.checkpoint_tensors import read_config, read_tensors
from models.loading.vendor_formats import refuse_vendor_format
from streaming.files.headers import FP8, INDEX_NAME, ITEM_BYTES, TensorEntry, read_header

# A block in float32, as stored, and its copies on the way: see the test that measures it. kv_b_proj of
# GLM-5.2, loaded whole, is the largest.
PEAK_BYTES = 300 * 10**6
STATE_NAME = "conversion.json"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)  # fmt: skip

Progress = Callable[[int, int], None]


def convert(
    source_dir: Path, target_dir: Path, recipe: Recipe, on_progress: Progress = lambda done, total: None
) -> None:
    """Converts a checkpoint; `on_progress` hears bytes done, of how many, in the target."""
    config = _read_config(source_dir)
    args = parse_args(config)
    entries = read_tensors(source_dir, args)
    refuse_vendor_format(source_dir, config, entries)
    source = Source(entries, _block_shape(config))
    shards = plan_shards(source, args, recipe)
    cache_limit = mx.set_cache_limit(0)
    try:
        _open_target(target_dir, {**_describe_source(source_dir, source), "recipe": asdict(recipe)})
        with _alone(target_dir):
            _write_shards(target_dir, shards, on_progress)
            _write_descriptions(source_dir, target_dir, config, shards, recipe)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(
                f"{target_dir}: the disk is full; free some and repeat the command; finished files are kept"
            ) from error
        raise UsageError(f"{error.filename or target_dir}: {error.strerror}") from error
    finally:
        mx.set_cache_limit(cache_limit)


def plan_shards(source: Source, args: ModelArgs, recipe: Recipe) -> list[list[Matrix]]:
    """The matrices of each file to be written; CheckpointError where the source makes no whole model."""
    groups = group_by_layer(list(source.entries), args)
    shards = [make_matrices(names, source, args, recipe) for names in groups]
    check_dense({matrix.name: matrix.shape for matrices in shards for matrix in matrices}, args)
    return shards


def advise_conversion(
    directory: Path, config: Mapping[str, Any], args: ModelArgs, entries: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError for a checkpoint in FP8: with the command, where the converter would take it."""
    if not any(entry.dtype == FP8 or name.endswith(scale_name("")) for name, entry in entries.items()):
        return
    try:
        plan_shards(Source(entries, _block_shape(config)), args, make_recipe(None, None, "affine"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory} holds FP8 that can be neither served nor made servable: {error}"
        ) from error
    raise CheckpointError(
        f"this is an FP8 checkpoint; make it loadable with: glmserve convert {directory} DST"
    )


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shards(target_dir: Path, shards: list[list[Matrix]], on_progress: Progress) -> None:
    specs = [_specs(matrices) for matrices in shards]
    sizes = [sum(spec.nbytes for spec in shard.values()) for shard in specs]
    paths = [target_dir / shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    _check_space(target_dir, sum(size for path, size in zip(paths, sizes, strict=True) if not path.exists()))
    done = 0
    for path, matrices, shard, size in zip(paths, shards, specs, sizes, strict=True):
        if path.exists():
            _check_finished(path, shard)
        else:
            _write_shard(path, matrices, shard, partial(_report, on_progress, done, sum(sizes)))
        done += size
        on_progress(done, sum(sizes))


def _report(on_progress: Progress, done: int, total: int, written: int) -> None:
    on_progress(done + written, total)


def _write_shard(
    path: Path, matrices: list[Matrix], specs: dict[str, TensorSpec], on_written: Callable[[int], None]
) -> None:
    written = 0
    with ShardWriter(path, specs) as shard:
        for matrix in matrices:
            for block in matrix.blocks():
                for name, array in matrix.pack(block.load()).items():
                    data = _as_bytes(array)
                    shard.write(name, block.first_row * _row_bytes(specs[name]), data)
                    written += len(data)
                on_written(written)


def _row_bytes(spec: TensorSpec) -> int:
    return spec.shape[-1] * ITEM_BYTES[spec.dtype]


def _as_bytes(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def _specs(matrices: list[Matrix]) -> dict[str, TensorSpec]:
    return {name: spec for matrix in matrices for name, spec in matrix.specs.items()}


def _read_config(source_dir: Path) -> dict[str, Any]:
    config = read_config(source_dir)
    if "quantization" in config:
        raise CheckpointError(f"{source_dir} is quantised already; convert from the original")
    return config


def _block_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    quantization = config.get("quantization_config") or {}
    shape = quantization.get("weight_block_size") if isinstance(quantization, dict) else quantization
    match shape or [128, 128]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise CheckpointError(f"config.json: FP8 blocks of {shape!r} are not supported, only [rows, columns]")


def _describe_source(source_dir: Path, source: Source) -> dict[str, Any]:
    """Where it is and when it was written: GLM-5.2 and 5.3 have the same names and shapes."""
    stamps = {entry.path.name: entry.stamp for entry in source.entries.values()}
    files = {name: [stamp.num_bytes, stamp.modified_ns] for name, stamp in sorted(stamps.items())}
    return {"source": str(source_dir.resolve()), "files": files}


def _open_target(target_dir: Path, state: dict[str, Any]) -> None:
    """Begins a new target, or goes on with one that this conversion began; anything else is left alone."""
    path = target_dir / STATE_NAME
    begun = _read_state(path)
    if begun is not None:
        if begun != state:
            raise UsageError(
                f"{target_dir} was begun from {begun.get('source')} with {begun.get('recipe')}"
                f"{_explain_change(begun, state)}; use another folder"
            )
        return
    # The state is written first of all: alone and unreadable it was cut, by a full disk or a kill.
    is_folder = target_dir.is_dir()
    if target_dir.exists() and not (is_folder and all(other == path for other in target_dir.iterdir())):
        raise UsageError(
            f"{target_dir} exists and is no unfinished conversion; it is left as it is, use another folder"
        )
    target_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state))


def _explain_change(begun: dict[str, Any], state: dict[str, Any]) -> str:
    is_other = any(begun.get(key) != state[key] for key in ("source", "recipe"))
    return "" if is_other else ", whose files have changed since"


@contextmanager
def _alone(target_dir: Path) -> Iterator[None]:
    """Keeps a second conversion out: it would cut the file that the first is writing and will call whole."""
    with open(target_dir / STATE_NAME, "rb") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{target_dir}: another conversion is at work there; let it finish") from error
        except OSError:
            pass  # some network file systems have no locks
        yield


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None
    return state if isinstance(state, dict) else None


def _check_space(target_dir: Path, needed: int) -> None:
    # What a cut conversion left of a file is overwritten.
    cut = sum(path.stat().st_blocks * 512 for path in target_dir.glob("*.partial"))
    free = shutil.disk_usage(target_dir).free + cut
    if needed > free:
        raise UsageError(
            f"{target_dir}: {format_size(needed)} are still to be written, the disk has {format_size(free)}"
        )


def _check_finished(path: Path, specs: dict[str, TensorSpec]) -> None:
    found = {entry.name: TensorSpec(entry.dtype, entry.shape) for entry in read_header(path)}
    if found != specs:
        raise CheckpointError(f"{path} is not what this conversion writes; remove it and repeat the command")


def _write_descriptions(
    source_dir: Path, target_dir: Path, config: dict[str, Any], shards: list[list[Matrix]], recipe: Recipe
) -> None:
    """Everything but the tensors; the folder counts as finished once the state file is gone."""
    weight_map = {
        name: shard_name(number, len(shards))
        for number, matrices in enumerate(shards, start=1)
        for name in _specs(matrices)
    }
    total = sum(spec.nbytes for matrices in shards for spec in _specs(matrices).values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target_dir / INDEX_NAME).write_text(json.dumps(index, indent=1))
    quantization = _describe_quantization(shards, recipe)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    described = {**config, "quantization": quantization, "quantization_config": quantization}
    (target_dir / "config.json").write_text(json.dumps(described, indent=2))
    for name in COPIED:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, target_dir / name)
    os.sync()  # after a power cut the state must not be gone and a description empty
    (target_dir / STATE_NAME).unlink()


def _describe_quantization(shards: list[list[Matrix]], recipe: Recipe) -> dict[str, Any]:
    """The base, and every module that differs from it; false for matrices that stay dense."""
    described: dict[str, Any] = asdict(recipe.base)
    for matrix in (matrix for matrices in shards for matrix in matrices):
        if matrix.quantization is None and len(matrix.shape) >= 2:
            described[matrix.path] = False
        elif matrix.quantization not in (None, recipe.base):
            described[matrix.path] = asdict(matrix.quantization)
    return described
