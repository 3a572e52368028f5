"""What the converter makes of each tensor: which matrix, how quantised, from which rows of the source.

Pure; knows names and shapes, reads nothing until a block is loaded.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from config.errors import CheckpointError
from models.args import ModelArgs
from models.arithmetic import AFFINE_BITS, AFFINE_GROUPS, Quantization
from models.convert.shards import TensorSpec
from models.convert.source import Source
from models.loading.tensor_names import is_unused, split_kv_b
from streaming.files.index import NUMBER, PROJECTIONS

# Values in one block: bounds the converter's memory, 16 MiB in float32.
BLOCK_VALUES = 4 * 2**20
# Rows start on whole FP8 blocks, so that a block's scales are looked up once.
_ROW_STEP = 128
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}

_LAYER = re.compile(rf"model\.layers\.({NUMBER})\.")
_EXPERT = re.compile(
    rf"(?P<mlp>model\.layers\.{NUMBER}\.mlp)\.experts\.(?P<expert>{NUMBER})\.(?P<projection>\w+)\.weight"
)
_FUSED = re.compile(r"(?P<mlp>model\.layers\.\d+\.mlp)\.experts\.(?P<kind>gate_up_proj|down_proj)")
# The indexer decides what attention sees at all and is 0.03 % of the bytes; the router likewise.
_KEPT_DENSE = re.compile(r".*\.(indexer\.\w+|mlp\.gate)\.weight")
_EMBEDDINGS = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Recipe:
    """How to quantise: everything as `base`, experts and embeddings with bits of their own where given."""

    base: Quantization
    experts_bits: int | None = None
    embed_bits: int | None = None

    def quantization(self, path: str, width: int) -> Quantization | None:
        """For the matrix at a module path with rows of `width`; None where it stays dense."""
        bits = self.base.bits
        if ".switch_mlp." in path:
            bits = self.experts_bits or bits
        elif path in _EMBEDDINGS:
            bits = self.embed_bits or bits
        fits = width % self.base.group_size == 0 and width * bits % 32 == 0
        return Quantization(self.base.group_size, bits, self.base.mode) if fits else None


def make_recipe(
    bits: int | None,
    group_size: int | None,
    mode: str,
    *,
    experts_bits: int | None = None,
    embed_bits: int | None = None,
) -> Recipe:
    """A recipe from what a user asked for; CheckpointError says what MLX can do instead."""
    if mode not in DEFAULTS:
        raise CheckpointError(f"mode {mode!r} is none of {', '.join(DEFAULTS)}")
    default_group, default_bits = DEFAULTS[mode]
    base = Quantization(
        default_group if group_size is None else group_size, default_bits if bits is None else bits, mode
    )
    asked = {base.bits, *(given for given in (experts_bits, embed_bits) if given is not None)}
    allowed = set(AFFINE_BITS) if mode == "affine" else {default_bits}
    groups = set(AFFINE_GROUPS) if mode == "affine" else {default_group}
    if not asked <= allowed or base.group_size not in groups:
        raise CheckpointError(f"mode {mode} takes bits of {sorted(allowed)} and groups of {sorted(groups)}")
    return Recipe(base, experts_bits, embed_bits)


@dataclass(frozen=True)
class RowBlock:
    """Rows of a matrix, from `first_row` on, [rows, width] once loaded."""

    first_row: int
    load: Callable[[], mx.array]


@dataclass(frozen=True)
class Matrix:
    """One matrix (or vector) to be written; leading dimensions are seen as more rows."""

    name: str  # of the dense tensor, ending in .weight unless it is a bias
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None
    blocks: Callable[[], Iterator[RowBlock]]

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that it becomes."""
        if self.quantization is None:
            return {self.name: TensorSpec(self.dtype, self.shape)}
        q, *lead, width = self.quantization, *self.shape
        scales = ("BF16" if self.dtype == "F32" else self.dtype) if q.mode == "affine" else "U8"
        specs = {
            self.name: TensorSpec("U32", (*lead, width * q.bits // 32)),
            f"{self.path}.scales": TensorSpec(scales, (*lead, width // q.group_size)),
        }
        if q.mode == "affine":
            specs[f"{self.path}.biases"] = specs[f"{self.path}.scales"]
        return specs

    def pack(self, block: mx.array) -> dict[str, mx.array]:
        """The block's rows of each tensor in `specs`."""
        specs = self.specs
        if self.quantization is None:
            return {self.name: block.astype(mx.float32) if specs[self.name].dtype == "F32" else block}
        q = self.quantization
        # As the model will hold its scales: quantising wider and rounding them afterwards would lose more.
        values = block.astype(mx.float16 if self.dtype == "F16" else mx.bfloat16)
        arrays = mx.quantize(values, group_size=q.group_size, bits=q.bits, mode=q.mode)
        return dict(zip(specs, arrays, strict=True))


def group_by_layer(names: Sequence[str], args: ModelArgs) -> list[list[str]]:
    """Names that one output file is made from: what is outside the layers first, then a layer each."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name in sorted(names):
        if not is_unused(name, args) and not name.endswith("_scale_inv"):
            match = _LAYER.match(name)
            groups[int(match[1]) if match else -1].append(name)
    return [groups[layer] for layer in sorted(groups)]


def make_matrices(names: Sequence[str], source: Source, args: ModelArgs, recipe: Recipe) -> list[Matrix]:
    """The matrices that these tensors of one layer become."""
    separate: defaultdict[str, dict[int, str]] = defaultdict(dict)
    matrices: list[Matrix] = []
    for name in names:
        if match := _EXPERT.fullmatch(name):
            separate[f"{match['mlp']}.switch_mlp.{match['projection']}.weight"][int(match["expert"])] = name
        elif match := _FUSED.fullmatch(name):
            matrices += _from_fused(match["mlp"], match["kind"], name, source, recipe)
        elif name.endswith("kv_b_proj.weight"):
            matrices += _from_kv_b(name, source, args, recipe)
        else:
            matrices.append(_from_tensor(name, source, recipe))
    matrices += [_from_separate(name, experts, source, args, recipe) for name, experts in separate.items()]
    return matrices


def _from_tensor(name: str, source: Source, recipe: Recipe) -> Matrix:
    shape = source.shape(name)
    if source.entries[name].dtype in ("U32", "U8") or name.endswith((".scales", ".biases")):
        raise CheckpointError(
            f"{source.entries[name].path}: {name} is quantised already; convert from the original"
        )
    is_dense = len(shape) < 2 or not name.endswith(".weight") or _KEPT_DENSE.fullmatch(name)
    quantization = None if is_dense else recipe.quantization(name.removesuffix(".weight"), shape[-1])
    dtype = "F32" if name.endswith("e_score_correction_bias") else source.decoded_dtype(name)
    return Matrix(name, shape, dtype, quantization, lambda: _rows_of(source, name, 0, _num_rows(shape), 0))


def _from_separate(
    name: str, experts: dict[int, str], source: Source, args: ModelArgs, recipe: Recipe
) -> Matrix:
    missing = [expert for expert in range(args.n_routed_experts) if expert not in experts]
    if missing or len(experts) > args.n_routed_experts:
        raise CheckpointError(
            f"{name}: {len(experts)} of {args.n_routed_experts} experts are there; missing {missing[:5]}"
        )
    rows, width = _matrix_shape(experts[0], source, 2)
    dtype = source.decoded_dtype(experts[0])
    for tensor in experts.values():
        found = (source.shape(tensor), source.decoded_dtype(tensor))
        if found != ((rows, width), dtype):
            raise CheckpointError(
                f"{tensor} is {found}, the layer's first expert is {((rows, width), dtype)}"
            )

    def blocks() -> Iterator[RowBlock]:
        for expert in range(len(experts)):
            yield from _rows_of(source, experts[expert], 0, rows, expert * rows)

    quantization = recipe.quantization(name.removesuffix(".weight"), width)
    return Matrix(name, (len(experts), rows, width), dtype, quantization, blocks)


def _from_fused(mlp: str, kind: str, name: str, source: Source, recipe: Recipe) -> list[Matrix]:
    """transformers' stacks: gate_up_proj [E, 2I, H] holds the gate's rows first, down_proj [E, H, I]."""
    num_experts, all_rows, width = _matrix_shape(name, source, 3)
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rows = all_rows // len(projections)

    def make(half: int, projection: str) -> Matrix:
        def blocks() -> Iterator[RowBlock]:
            for expert in range(num_experts):
                start = expert * all_rows + half * rows
                yield from _rows_of(source, name, start, start + rows, expert * rows)

        path = f"{mlp}.switch_mlp.{projection}"
        assert projection in PROJECTIONS, "the model knows no such projection"
        quantization = recipe.quantization(path, width)
        return Matrix(
            f"{path}.weight", (num_experts, rows, width), source.decoded_dtype(name), quantization, blocks
        )

    return [make(half, projection) for half, projection in enumerate(projections)]


def _matrix_shape(name: str, source: Source, rank: int) -> tuple[int, ...]:
    shape = source.shape(name)
    if len(shape) != rank:
        raise CheckpointError(
            f"{source.entries[name].path}: {name} is {shape}, which has not {rank} dimensions"
        )
    return shape


def _from_kv_b(name: str, source: Source, args: ModelArgs, recipe: Recipe) -> list[Matrix]:
    """kv_b_proj split by head; a head's rows do not end on FP8 blocks, so it is loaded whole (59 MB)."""
    heads, nope, v, latent = (
        args.num_attention_heads,
        args.qk_nope_head_dim,
        args.v_head_dim,
        args.kv_lora_rank,
    )
    if source.shape(name) != (heads * (nope + v), latent):
        raise CheckpointError(f"{name} is {source.shape(name)}, not {(heads * (nope + v), latent)}")
    prefix = name.removesuffix("kv_b_proj.weight")

    def make(which: int, part: str, shape: tuple[int, ...]) -> Matrix:
        def load() -> mx.array:
            return split_kv_b(source.rows(name, 0, heads * (nope + v)), args)[which].reshape(-1, shape[-1])

        quantization = recipe.quantization(prefix + part, shape[-1])
        dtype = source.decoded_dtype(name)
        return Matrix(f"{prefix}{part}.weight", shape, dtype, quantization, lambda: iter([RowBlock(0, load)]))

    return [make(0, "embed_q", (heads, latent, nope)), make(1, "unembed_out", (heads, v, latent))]


def _rows_of(source: Source, name: str, start: int, stop: int, first_row: int) -> Iterator[RowBlock]:
    """Blocks of rows `start` to `stop` of a tensor; the first of them becomes row `first_row`."""
    shape = source.shape(name)
    if len(shape) < 2:
        yield RowBlock(0, lambda: source.rows(name, 0, 1).reshape(shape))
        return
    step = max(_ROW_STEP, BLOCK_VALUES // shape[-1] // _ROW_STEP * _ROW_STEP)
    for row in range(start, stop, step):
        end = min(row + step, stop)
        yield RowBlock(first_row + row - start, lambda row=row, end=end: source.rows(name, row, end))  # type: ignore[misc]


def _num_rows(shape: tuple[int, ...]) -> int:
    return prod(shape[:-1])
