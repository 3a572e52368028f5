"""Which files an aligned checkpoint is made of. Called by `align`; pure, it reads and writes nothing.

Each layer's experts get a file of their own, one tensor for each part of each expert, the parts of one side
by side. mlx-lm stacks tensors of these names. Other tensors stay in their shard as long as it stays.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from models.convert.aligned_shard import Copy
from models.convert.shards import PAGE
from models.loading.checkpoint_names import unwrapped
from streaming.files.headers import TensorEntry
from streaming.files.index import ExpertIndex

_LAYER_PATH = re.compile(r"(.*\.mlp\.)(?:switch_mlp|experts)\..*")


@dataclass(frozen=True)
class Step:
    """One new file: the tensors that it is made of, and the names that the index loses to it."""

    name: str
    copies: tuple[Copy, ...]
    replaced: frozenset[str]

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)

    def applied_to(self, weight_map: Mapping[str, str]) -> dict[str, str]:
        """An index (tensor to file) once this file is there."""
        kept = {name: file for name, file in weight_map.items() if name not in self.replaced}
        return kept | {copy.name: self.name for copy in self.copies}


def plan_steps(tensors: Mapping[str, TensorEntry], index: ExpertIndex) -> Iterator[Step]:
    """The files to be written, in order: a layer's experts, then what else was in shards that these empty.

    A layer whose experts are in their file already is left out.
    """
    experts = _expert_names(tensors, index)
    left = {name: entry.path for name, entry in tensors.items()}
    for layer in (layer for layer in index.layers if experts[layer]):
        step = _experts_step(layer, index, experts[layer])
        yield step
        shards = {left.pop(name) for name in step.replaced}
        waiting = {left[name] for other in index.layers if other > layer for name in experts[other]}
        for path in sorted(shards - waiting):
            rest = [tensors[name] for name, where in left.items() if where == path]
            left = {name: where for name, where in left.items() if where != path}
            if rest:
                yield _rest_step(path, rest)


def _expert_names(tensors: Mapping[str, TensorEntry], index: ExpertIndex) -> dict[int, frozenset[str]]:
    """The tensors of each layer's experts that are still to be rewritten, by the names that files have."""
    found: dict[int, set[str]] = {layer: set() for layer in index.layers}
    for name, entry in unwrapped(tensors).items():
        layer = ExpertIndex.layer_of(name)
        if layer is not None and layer in found and entry.path.name != experts_name(layer):
            found[layer].add(entry.name)
    return {layer: frozenset(names) for layer, names in found.items()}


def _experts_step(layer: int, index: ExpertIndex, replaced: frozenset[str]) -> Step:
    match = _LAYER_PATH.fullmatch(min(replaced))
    assert match, "an expert's tensor has a layer's path"
    order = sorted(range(len(index.parts(layer))), key=lambda n: -gcd(index.parts(layer)[n].nbytes, PAGE))
    copies = []
    for expert in range(index.num_experts):
        pieces = index.pieces(layer, expert)
        for part, path, offset in (pieces[number] for number in order):
            name = f"{match[1]}experts.{expert}.{part.name}"
            copies.append(Copy(name, part.dtype, part.shape, path, offset, part.nbytes))
    return Step(experts_name(layer), tuple(copies), replaced)


def _rest_step(path: Path, entries: list[TensorEntry]) -> Step:
    entries.sort(key=lambda entry: (-gcd(entry.nbytes, PAGE), entry.name))
    copies = tuple(Copy(e.name, e.dtype, e.shape, e.path, e.offset, e.nbytes) for e in entries)
    name = f"model-rest{path.stem.removeprefix('model')}.safetensors"
    return Step(name, copies, frozenset(entry.name for entry in entries))


def experts_name(layer: int) -> str:
    """The file of one layer's experts."""
    return f"model-experts-{layer:05d}.safetensors"
