"""Where each expert's bytes lie: for every (layer, expert, part) a file and a byte range.

Owns the names of expert tensors. Built at start-up from safetensors headers alone, immutable afterwards,
read by the store. Three layouts: MLX stacked (`switch_mlp`), one tensor per expert, and transformers' fused
stacks.
"""

import mmap
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

from config.errors import CheckpointError
from streaming.files.headers import FP8, ITEM_BYTES, FileStamp, TensorEntry

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("weight", "scales", "biases")
PART_NAMES = tuple(f"{projection}.{kind}" for projection in PROJECTIONS for kind in KINDS)
_PART = rf"(?P<part>(?:{'|'.join(PROJECTIONS)})\.(?:{'|'.join(KINDS)}|weight_scale_inv))"
# Without leading zeros, by which two tensors would be one, and of a length that Python parses.
NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_EXPERT_TENSOR = re.compile(
    rf"model\.layers\.(?P<layer>{NUMBER})\.mlp\.(?:"
    rf"switch_mlp\.{_PART}"
    rf"|experts\.(?P<expert>{NUMBER})\.{_PART.replace('<part>', '<own_part>')}"
    r"|experts\.(?P<fused>gate_up_proj|down_proj)(?:_scale_inv)?)"
)
_STREAMABLE = {"U32", "U8", "BF16", "F16", "F32"}


@dataclass(frozen=True)
class Part:
    """One tensor of one expert; `shape` and `nbytes` are as stored on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """The byte range that holds one part of one expert."""

    part: Part
    path: Path
    offset: int


class _Source(Protocol):
    """Where the experts of one layer keep one part; `lead`: how far behind the start of a page."""

    @property
    def part(self) -> Part: ...

    @property
    def lead(self) -> int: ...

    def locate(self, expert: int) -> Piece: ...


@dataclass(frozen=True)
class _Stack:
    """All experts in one tensor, `stride` bytes apart."""

    part: Part
    path: Path
    start: int
    stride: int

    @property
    def lead(self) -> int:
        return self.start % mmap.PAGESIZE

    def locate(self, expert: int) -> Piece:
        return Piece(self.part, self.path, self.start + expert * self.stride)


@dataclass(frozen=True)
class _Separate:
    """A tensor for each expert."""

    part: Part
    places: tuple[tuple[Path, int], ...]

    @property
    def lead(self) -> int:
        return self.places[0][1] % mmap.PAGESIZE

    def locate(self, expert: int) -> Piece:
        return Piece(self.part, *self.places[expert])


class ExpertIndex:
    """The experts of all layers. `layers` ascend; `num_experts` is the same in each of them.

    `experts`: the ids, ascending, that this machine has to do with: all, or those that it owns in a cluster.
    """

    def __init__(
        self, sources: Mapping[int, Mapping[str, _Source]], num_experts: int, stamps: Mapping[Path, FileStamp]
    ) -> None:
        self.layers = tuple(sorted(sources))
        self.num_experts = num_experts
        self.experts: Sequence[int] = range(num_experts)
        self.stamps = dict(stamps)
        self._sources = {layer: _in_order(layer, sources[layer]) for layer in self.layers}

    @classmethod
    def from_entries(cls, entries: Mapping[str, TensorEntry], num_layers: int | None = None) -> "ExpertIndex":
        """The index of tensors by name; layers from `num_layers` on (the MTP head) are left out."""
        builder = _Builder()
        for name, entry in entries.items():
            match = _EXPERT_TENSOR.fullmatch(name)
            if match and (num_layers is None or int(match["layer"]) < num_layers):
                builder.add(match, entry)
        return builder.build()

    def part(self, experts: Sequence[int]) -> "ExpertIndex":
        """The same files for a machine that owns only these experts (ids, ascending) of each layer."""
        part = copy(self)
        part.experts = experts
        return part

    @staticmethod
    def is_expert_tensor(name: str) -> bool:
        """Whether the trunk loader must leave this tensor out."""
        return _EXPERT_TENSOR.fullmatch(name) is not None

    @staticmethod
    def layer_of(name: str) -> int | None:
        """The layer of an expert's tensor; None for another tensor."""
        match = _EXPERT_TENSOR.fullmatch(name)
        return int(match["layer"]) if match else None

    def parts(self, layer: int) -> tuple[Part, ...]:
        return tuple(source.part for source in self._sources[layer])

    def leads(self, layer: int) -> tuple[int, ...]:
        """How far behind the start of a page each part of the first expert lies, in the order of `parts`."""
        return tuple(source.lead for source in self._sources[layer])

    def pieces(self, layer: int, expert: int) -> tuple[Piece, ...]:
        """Where the parts of one expert lie, in the order of `parts`."""
        return tuple(source.locate(expert) for source in self._sources[layer])

    def expert_bytes(self, layer: int) -> int:
        """Bytes on disk of one expert of this layer."""
        return sum(part.nbytes for part in self.parts(layer))


class _Builder:
    """Collects tensors by layer, then checks that every expert of a layer is whole and alike."""

    def __init__(self) -> None:
        self._sources: defaultdict[int, dict[str, _Source]] = defaultdict(dict)
        self._counts: dict[int, int] = {}
        self._singles: defaultdict[tuple[int, str], dict[int, TensorEntry]] = defaultdict(dict)
        self._stamps: dict[Path, FileStamp] = {}

    def add(self, match: re.Match[str], entry: TensorEntry) -> None:
        if entry.dtype not in _STREAMABLE or entry.name.endswith("scale_inv"):
            is_converted = entry.dtype == FP8 or entry.name.endswith("scale_inv")
            advice = "make a streamable copy with: glmserve convert SRC DST"
            raise CheckpointError(
                f"{entry.path}: experts stored as {entry.dtype} ({entry.name}) cannot be streamed; "
                + (advice if is_converted else f"types that can be are {', '.join(sorted(_STREAMABLE))}")
            )
        self._stamps[entry.path] = entry.stamp
        layer = int(match["layer"])
        if match["expert"] is not None:
            self._singles[layer, match["own_part"]][int(match["expert"])] = entry
        elif match["fused"] == "gate_up_proj":
            self._add_gate_up(layer, entry)
        else:
            self._add_stack(layer, match["part"] or "down_proj.weight", entry)

    def _add_stack(self, layer: int, name: str, entry: TensorEntry) -> None:
        num_experts = self._count(layer, entry)
        stride = entry.nbytes // num_experts
        self._put(layer, _Stack(Part(name, entry.dtype, entry.shape[1:]), entry.path, entry.offset, stride))

    def _add_gate_up(self, layer: int, entry: TensorEntry) -> None:
        num_experts = self._count(layer, entry)
        if len(entry.shape) != 3 or entry.shape[1] % 2:
            raise CheckpointError(
                f"{entry.path}: {entry.name} has shape {entry.shape}, not [experts, 2 x width, hidden]"
            )
        _, rows, columns = entry.shape
        stride = entry.nbytes // num_experts
        for half, projection in enumerate(("gate_proj", "up_proj")):
            part = Part(f"{projection}.weight", entry.dtype, (rows // 2, columns))
            self._put(layer, _Stack(part, entry.path, entry.offset + half * stride // 2, stride))

    def _count(self, layer: int, entry: TensorEntry) -> int:
        if len(entry.shape) < 2 or 0 in entry.shape:
            raise CheckpointError(
                f"{entry.path}: {entry.name} has shape {entry.shape}, which is no stack of experts"
            )
        num_experts = self._counts.setdefault(layer, entry.shape[0])
        if num_experts != entry.shape[0]:
            raise CheckpointError(
                f"{entry.path}: {entry.name} holds {entry.shape[0]} experts, its layer has {num_experts}"
            )
        return num_experts

    def _put(self, layer: int, source: _Source) -> None:
        if source.part.name in self._sources[layer]:
            raise CheckpointError(f"layer {layer} stores {source.part.name} of its experts in two layouts")
        self._sources[layer][source.part.name] = source

    def build(self) -> ExpertIndex:
        for (layer, _), singles in self._singles.items():
            self._counts[layer] = max(self._counts.get(layer, 0), max(singles) + 1)
        for (layer, name), singles in self._singles.items():
            self._put(layer, _separate(layer, name, singles, self._counts[layer]))
        if not self._sources:
            raise CheckpointError(
                "the checkpoint holds no expert tensors (model.layers.N.mlp.switch_mlp or .experts)"
            )
        counts = set(self._counts.values())
        if len(counts) > 1:
            raise CheckpointError(f"layers differ in their number of experts: {sorted(counts)}")
        return ExpertIndex(self._sources, counts.pop(), self._stamps)


def _separate(layer: int, name: str, singles: Mapping[int, TensorEntry], num_experts: int) -> _Separate:
    for expert in range(num_experts):
        if expert not in singles:
            raise CheckpointError(f"tensor model.layers.{layer}.mlp.experts.{expert}.{name} is missing")
    first = singles[0]
    for entry in singles.values():
        if (entry.dtype, entry.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {entry.dtype} {entry.shape}, "
                f"the layer's first expert is {first.dtype} {first.shape}"
            )
    places = tuple((singles[expert].path, singles[expert].offset) for expert in range(num_experts))
    return _Separate(Part(name, first.dtype, first.shape), places)


def _in_order(layer: int, sources: Mapping[str, _Source]) -> tuple[_Source, ...]:
    for projection in PROJECTIONS:
        weight = sources.get(f"{projection}.weight")
        if weight is None:
            raise CheckpointError(f"layer {layer}: {projection}.weight of the experts is missing")
        if weight.part.dtype == "U32" and f"{projection}.scales" not in sources:
            raise CheckpointError(
                f"layer {layer}: {projection} of the experts is quantised but has no scales"
            )
    return tuple(sources[name] for name in PART_NAMES if name in sources)
