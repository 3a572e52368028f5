"""Opening a checkpoint: what it is, what it needs, and the model that computes it. Called by the engine.

Everything about expert bytes is the business of `streaming/`; here the trunk is loaded and both are joined.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from config.errors import CheckpointError
from config.plan import Geometry
from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.convert.convert import advise_conversion
from models.experts.exchange import Exchange, exchange_bytes
from models.families import family_of, parse_args
from models.glm_moe_dsa import Model
from models.loading.building import as_held, build_model, check_experts, check_trunk, held_bytes
from models.loading.checkpoint_tensors import read_config as read_config
from models.loading.checkpoint_tensors import read_tensors
from models.loading.tensor_names import trunk_names
from models.loading.vendor_formats import refuse_vendor_format
from models.workspace import loading_bytes
from streaming.banks import slot_bytes
from streaming.disk.reads import buffer_bytes
from streaming.files.headers import FileStamp, TensorEntry
from streaming.files.index import ExpertIndex
from streaming.files.read_plan import largest_run_bytes
from streaming.store import ExpertStore


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, read and found consistent; no tensor has been touched."""

    directory: Path
    args: ModelArgs
    trunk: dict[str, TensorEntry]
    experts: ExpertIndex


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config and headers. Raises CheckpointError for anything that cannot be computed or is missing."""
    config = read_config(directory)
    refuse_vendor_format(directory, config, {})
    args = parse_args(config)
    entries = read_tensors(directory, args)
    refuse_vendor_format(directory, config, entries)
    advise_conversion(directory, config, args, entries)
    experts = ExpertIndex.from_entries(entries, args.num_hidden_layers)
    if experts.layers != tuple(args.moe_layers) or experts.num_experts != args.n_routed_experts:
        raise CheckpointError(
            f"{directory}: config.json describes {args.n_routed_experts} experts in layers "
            f"{args.moe_layers.start} to {args.moe_layers.stop - 1}, the files hold {experts.num_experts} "
            f"in layers {experts.layers[0]} to {experts.layers[-1]}"
        )
    check_experts(experts, args)
    trunk = {name: entries[name] for name in trunk_names(entries, args)}
    check_trunk(trunk, args)
    return Checkpoint(directory, args, trunk, experts)


def load_model(
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    store: ExpertStore,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    exchange: Exchange | None = None,
) -> Model:
    """The model with its trunk in memory and its experts behind `store`.

    `on_progress` hears how many of the trunk's files are done, of how many. Call it on the thread that
    will compute: MLX arrays belong to the thread that makes them.
    """
    paths = sorted({entry.path for entry in checkpoint.trunk.values()})
    tensors: dict[str, mx.array] = {}
    for done, path in enumerate(paths, start=1):
        entries = {name: entry for name, entry in checkpoint.trunk.items() if entry.path == path}
        tensors |= _read_tensors(path, entries, checkpoint.args, arithmetic)
        on_progress(done, len(paths))
    return build_model(checkpoint.args, arithmetic, store, tensors, exchange)


def _read_tensors(
    path: Path, entries: Mapping[str, TensorEntry], args: ModelArgs, arithmetic: Arithmetic
) -> dict[str, mx.array]:
    """Some tensors of a file as the model holds them, one after the other: see `loading_bytes`.

    CheckpointError where it cannot be read or is not the one whose header was.
    """
    tensors: dict[str, mx.array] = {}
    try:
        lazy: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        for name, entry in entries.items():
            tensors |= as_held({name: lazy.pop(entry.name)}, args, arithmetic)
        stamp = FileStamp.from_path(path)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: {min(entries)} and others cannot be read: {error}") from error
    if any(entry.stamp != stamp for entry in entries.values()):
        raise CheckpointError(f"{path} was replaced or changed while it was loaded; start the server again")
    return tensors


def trunk_bytes(model: Model) -> int:
    """Memory of the trunk that was loaded."""
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def make_geometry(checkpoint: Checkpoint, arithmetic: Arithmetic, max_context: int | None = None) -> Geometry:
    """What the checkpoint needs in memory when it is computed with this arithmetic, up to this context."""
    args, index = checkpoint.args, checkpoint.experts
    itemsize, context = arithmetic.dtype.size, max_context or args.max_position_embeddings
    computing = family_of(args).load()
    cache = computing.cache_bytes(args, itemsize)
    num_ranks = -(-index.num_experts // len(index.experts))
    return Geometry(
        trunk_bytes=sum(
            held_bytes(name, entry, arithmetic, computing.float32) for name, entry in checkpoint.trunk.items()
        ),
        expert_bytes=tuple(slot_bytes(index.parts(layer), arithmetic.dtype) for layer in index.layers),
        num_experts=len(index.experts),
        experts_per_token=args.num_experts_per_tok,
        kv_bytes_per_token=cache.latents_per_token,
        index_key_bytes_per_token=cache.index_keys_per_token,
        workspace_bytes=max(
            computing.workspace_bytes(args, arithmetic, checkpoint.trunk, index, context)
            + (exchange_bytes(num_ranks, args.hidden_size) if num_ranks > 1 else 0),
            loading_bytes(checkpoint.trunk, arithmetic, computing.float32),  # before there are steps
        ),
        reader_buffer_bytes=buffer_bytes(largest_run_bytes(index)),
        sweep_row_bytes=computing.sweep_row_bytes(args, arithmetic, context),
        ring_slot_bytes=_ring_slot_bytes(index, arithmetic),
        vocab_size=args.vocab_size,
        state_bytes=cache.state,
    )


def _ring_slot_bytes(index: ExpertIndex, arithmetic: Arithmetic) -> int:
    """One slot of the ring, for each kind of expert."""
    return sum(
        slot_bytes(parts, arithmetic.dtype) for parts in {index.parts(layer) for layer in index.layers}
    )
