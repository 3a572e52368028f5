"""From named tensors to a model that holds them. Called by loading, and by tests with their own tensors."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from config.errors import CheckpointError
from models.args import ModelArgs
from models.arithmetic import AFFINE_BITS, AFFINE_GROUPS, CPU, Arithmetic, Quantization
from models.experts.divided_experts import DividedExperts
from models.experts.exchange import Exchange
from models.experts.experts import Experts
from models.families import family_of
from models.glm_moe_dsa import DenseMlp, Model
from models.linear import Linear
from streaming.files.floats import MLX_TYPES
from streaming.files.headers import TensorEntry
from streaming.files.index import PROJECTIONS, ExpertIndex, Part
from streaming.store import ExpertStore

Names = tuple[str, ...]


def build_model(
    args: ModelArgs,
    arithmetic: Arithmetic,
    source: ExpertStore,
    tensors: Mapping[str, mx.array],
    exchange: Exchange | None = None,
) -> Model:
    """A model whose trunk holds `tensors`, made by `as_held`, and whose experts come from `source`.

    `exchange`: with the machines that own the other experts, in a cluster.
    Raises CheckpointError naming the missing, unexpected or misshapen tensors.
    """
    arithmetic = replace(arithmetic, swiglu_limit=args.gate_limit)

    def make_experts(layer: int) -> Experts:
        quantizations = bank_quantizations(source.bank(layer), args)
        if exchange is not None:
            return DividedExperts(layer, source, quantizations, arithmetic, exchange)
        return Experts(layer, source, quantizations, arithmetic)

    model = family_of(args).load().make_model(args, arithmetic, make_experts)
    _pack_like(model, tensors)
    wanted = dict(tree_flatten(model.parameters()))
    _check(wanted, tensors)
    model.load_weights(list(tensors.items()), strict=True)
    model.freeze()
    mx.eval(model.parameters())
    return model


def as_held(tensors: Mapping[str, mx.array], args: ModelArgs, arithmetic: Arithmetic) -> dict[str, mx.array]:
    """Tensors of a checkpoint under the names and in the types in which the model holds them, evaluated."""
    computing = family_of(args).load()
    named = computing.to_model_names(tensors, args).items()
    exact = computing.float32
    held = {name: tensor.astype(held_dtype(name, tensor.dtype, arithmetic, exact)) for name, tensor in named}
    mx.eval(held)
    return held


def bank_quantizations(bank: Mapping[str, mx.array], args: ModelArgs) -> dict[str, Quantization | None]:
    """How each projection of a bank is packed."""
    widths = {"gate_proj": args.hidden_size, "up_proj": args.hidden_size,
              "down_proj": args.moe_intermediate_size}  # fmt: skip
    return {
        name: infer_quantization(f"{name}", bank[f"{name}.weight"], bank.get(f"{name}.scales"), widths[name])
        for name in PROJECTIONS
    }


def check_experts(index: ExpertIndex, args: ModelArgs) -> None:
    """CheckpointError where the experts of a layer are not what config.json describes.

    MLX does not look at the shapes of gathered products: with too few scales it reads behind their end.
    """
    checked: set[tuple[Part, ...]] = set()
    for layer in index.layers:
        if (parts := index.parts(layer)) in checked:
            continue
        given = {part.name: _placeholder(f"layer {layer}, experts' {part.name}", part) for part in parts}
        expert = DenseMlp(args.hidden_size, args.moe_intermediate_size, CPU)
        name = f"layer {layer}, experts' "
        for projection, linear in expert.named_modules():
            if isinstance(linear, Linear) and (scales := given.get(f"{projection}.scales")) is not None:
                _pack(linear, name + projection, given[f"{projection}.weight"], scales)
        wanted = dict(tree_flatten(expert.parameters()))
        _check({name + n: a for n, a in wanted.items()}, {name + n: a for n, a in given.items()})
        checked.add(parts)


def check_trunk(trunk: Mapping[str, TensorEntry], args: ModelArgs) -> None:
    """CheckpointError, with tensors and their files, unless these headers make the trunk of config.json.

    The experts are read before the trunk, which takes minutes: what is missing is known without reading.
    """
    given: dict[str, mx.array] = {}
    paths: dict[str, Path] = {}
    to_model_names = family_of(args).load().to_model_names
    for name, entry in trunk.items():
        tensor = _placeholder(f"{entry.path}: {name}", entry)
        made = to_model_names({name: tensor}, args)
        if twice := made.keys() & given.keys():
            raise CheckpointError(f"{entry.path}: {name} holds {min(twice)} a second time")
        given |= made
        paths |= dict.fromkeys(made, entry.path)
    model = _without_experts(args)
    _pack_like(model, given)
    _check(dict(tree_flatten(model.parameters())), given, lambda name: f" (in {paths[name].name})")


def check_dense(shapes: Mapping[str, tuple[int, ...]], args: ModelArgs) -> None:
    """CheckpointError unless tensors of these names and shapes, none packed, make a whole model."""
    wanted = dict(tree_flatten(_without_experts(args).parameters()))
    expert = dict(tree_flatten(DenseMlp(args.hidden_size, args.moe_intermediate_size, CPU).parameters()))
    for layer in args.moe_layers:
        for name, array in expert.items():
            stack = mx.zeros((args.n_routed_experts, *array.shape))
            wanted[f"model.layers.{layer}.mlp.switch_mlp.{name}"] = stack
    _check(wanted, {name: mx.zeros(shape) for name, shape in shapes.items()})


def infer_quantization(
    path: str, weight: mx.array, scales: mx.array | None, input_dims: int
) -> Quantization | None:
    """How a weight is packed, from its shapes: they always decide, where config.json may lack an override.

    A packed row holds input_dims * bits / 32 words and one scale for each group; scales of 8 bits mean one
    of the mx or nv formats (mlx `quantize`). None for a dense weight.
    """
    if scales is None:
        return None
    words, groups = (array.shape[-1] if array.ndim else 0 for array in (weight, scales))
    bits, rest = divmod(words * 32, input_dims)
    group_size, rest2 = divmod(input_dims, groups) if groups else (0, 1)
    mode = "affine" if bits in AFFINE_BITS and group_size in AFFINE_GROUPS else ""
    if scales.dtype == mx.uint8:
        mode = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}.get((bits, group_size), "")
    if rest or rest2 or not mode or weight.dtype != mx.uint32:
        raise CheckpointError(
            f"{path}: weight {weight.shape} {weight.dtype} with scales {scales.shape} {scales.dtype} "
            f"is no packing of {input_dims} inputs that MLX knows"
        )
    return Quantization(group_size, bits, mode)


def _without_experts(args: ModelArgs) -> Model:
    """A model of placeholders, lazy: it takes no memory, whatever sizes config.json claims."""
    nowhere = cast(ExpertStore, None)
    try:
        return family_of(args).load().make_model(args, CPU, lambda layer: Experts(layer, nowhere, {}, CPU))
    except OverflowError as error:
        raise CheckpointError("config.json: its sizes make matrices that MLX cannot hold") from error


def _placeholder(where: str, tensor: Part | TensorEntry) -> mx.array:
    """An array of zeros, lazy, in the place of a tensor that only its header is known of."""
    if tensor.dtype not in MLX_TYPES:
        raise CheckpointError(f"{where} is stored as {tensor.dtype}; weights are {', '.join(MLX_TYPES)}")
    try:
        return mx.zeros(tensor.shape, MLX_TYPES[tensor.dtype])
    except OverflowError as error:
        raise CheckpointError(f"{where} is {tensor.shape}, which MLX cannot hold") from error


def held_bytes(name: str, entry: TensorEntry, arithmetic: Arithmetic, exact: Names) -> int:
    """What a tensor of the trunk takes in the model.

    GLM-5.2's routers, 118 million weights, are published in bfloat16 and held in float32.
    """
    return prod(entry.shape) * held_dtype(name, MLX_TYPES[entry.dtype], arithmetic, exact).size


def is_held_as_stored(name: str, entry: TensorEntry, arithmetic: Arithmetic, exact: Names) -> bool:
    """Whether a tensor of the trunk is held in the type in which it lies on disk."""
    stored = MLX_TYPES[entry.dtype]
    return held_dtype(name, stored, arithmetic, exact) == stored


def held_dtype(name: str, stored: mx.Dtype, arithmetic: Arithmetic, exact: Names) -> mx.Dtype:
    """Packed words stay; float tensors become what the backend computes in.

    On the CPU that is float32 for all, or each product would cast every scale again. Elsewhere it is that of
    the activations, as in the experts' banks: float16 beside bfloat16 makes float32 of both, and from the
    first norm on of all activations. Names that end with `exact` are float32, and the indexer, which
    computes in float32, keeps the precision it was stored in.
    """
    if not mx.issubdtype(stored, mx.floating):
        return stored
    if arithmetic.dtype == mx.float32 or name.endswith(exact):
        return mx.float32
    return stored if ".indexer." in name and stored != mx.float32 else arithmetic.dtype


def _pack_like(model: Model, tensors: Mapping[str, mx.array]) -> None:
    """Turn the layers that come with scales into packed ones."""
    for path, module in model.named_modules():
        weight, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if weight is None or scales is None:
            continue
        if isinstance(module, Linear):
            _pack(module, path, weight, scales)
        elif isinstance(module, nn.Embedding):
            _pack_embedding(model, path, weight, scales)


def _pack(linear: Linear, path: str, weight: mx.array, scales: mx.array) -> None:
    quantization = infer_quantization(path, weight, scales, linear.weight.shape[-1])
    assert quantization is not None, "scales are there"
    linear.pack(quantization)


def _pack_embedding(model: Model, path: str, weight: mx.array, scales: mx.array) -> None:
    args = model.args
    q = infer_quantization(path, weight, scales, args.hidden_size)
    assert q is not None, "scales are there"
    model.model.embed_tokens = nn.QuantizedEmbedding(
        args.vocab_size, args.hidden_size, group_size=q.group_size, bits=q.bits, mode=q.mode
    )


def _check(
    wanted: Mapping[str, mx.array],
    given: Mapping[str, mx.array],
    where: Callable[[str], str] = lambda name: "",
) -> None:
    """Name what is missing, unexpected, of another shape, or of numbers that mean something else.

    FP8 without scales and integers have the right shapes too; as weights they would compute nonsense.
    `where`: of a given tensor, to be said after its fault.
    """
    problems = [f"missing {name}" for name in sorted(wanted.keys() - given.keys())]
    problems += [f"unexpected {name}{where(name)}" for name in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{name} is {given[name].shape}, not {array.shape}{where(name)}"
        for name, array in sorted(wanted.items())
        if name in given and given[name].shape != array.shape
    ]
    problems += [
        f"{name} is stored as {given[name].dtype}{where(name)}"
        for name, array in sorted(wanted.items())
        if name in given and _kind(given[name]) != _kind(array)
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"the checkpoint's tensors do not fit its config.json: {shown}{more}")


def _kind(array: mx.array) -> mx.Dtype:
    """Floats of any width are one kind; packed words and scales of 8 bits are each their own."""
    return mx.float32 if mx.issubdtype(array.dtype, mx.floating) else array.dtype
