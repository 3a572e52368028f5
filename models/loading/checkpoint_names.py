"""Names that checkpoints give to tensors: behind which wrapper, which are used, whether all are there.

Pure, and without MLX: the HTTP process asks whether a download is complete before the engine starts. Names
are those of transformers and mlx-lm, perhaps behind what a model of images puts before its language model.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from config.errors import CheckpointError
from models.args import ModelArgs
from models.families import family_of
from models.family import Layouts
from streaming.files.index import NUMBER, PROJECTIONS

_LAYER = re.compile(rf"model\.layers\.({NUMBER})\.(.*)")
_EMBEDDING = re.compile(r"((?:(?!layers\.)[^.]+\.)*)embed_tokens\.weight")
_HEAD = re.compile(r"(?:[^.]+\.)*lm_head\.(?=[^.]+$)")

Tensor = TypeVar("Tensor")


def plain_names(tensors: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The language model's tensors under the names that its model gives them.

    Behind a wrapper (`language_model.model.` of mlx-vlm, `model.language_model.`) lies only a part of the
    checkpoint; tensors for images and sound are left out. CheckpointError where there are two models.
    """
    rename = family_of(args).plain_name
    return {rename(name): tensor for name, tensor in unwrapped(tensors).items()}


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before their names."""
    wrapper = _find_wrapper(tensors)
    if wrapper == "model.":
        return dict(tensors)
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(wrapper) and not _HEAD.match(name):
            plain["model." + name.removeprefix(wrapper)] = tensor
        elif head := _HEAD.match(name):
            plain["lm_head." + name[head.end() :]] = tensor
    return plain


def _find_wrapper(names: Iterable[str]) -> str:
    """What stands before `embed_tokens` and `layers` of the language model."""
    names = list(names)
    found = {match[1] for name in names if (match := _EMBEDDING.fullmatch(name))}
    found = {wrapper for wrapper in found if any(name.startswith(f"{wrapper}layers.0.") for name in names)}
    if len(found) > 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} language models: {', '.join(sorted(found))}; "
            "only one can be served"
        )
    return found.pop() if found else "model."


def is_unused(name: str, args: ModelArgs) -> bool:
    """Tensors that checkpoints carry and the model leaves out.

    They are the MTP layer (numbers from `num_hidden_layers` on), indexers of shared layers, and rotary
    tables.
    """
    match = _LAYER.match(name)
    if match is None:
        return name.endswith("rotary_emb.inv_freq")
    layer, rest = int(match[1]), match[2]
    if layer >= args.num_hidden_layers or rest.endswith("rotary_emb.inv_freq"):
        return True
    return rest.startswith("self_attn.indexer.") and layer not in args.full_layers


def is_complete(names: Collection[str], args: ModelArgs) -> bool:
    """Whether tensors of these names, plain or behind a wrapper, are a whole model in a known layout."""
    there = plain_names(dict.fromkeys(names), args).keys()
    packed = {name.rpartition(".")[0] for name in there if name.endswith(".scales")}
    return all(
        any(all(name in there for name in layout) for layout in layouts) for layouts in _wanted(args)
    ) and all(f"{path}.weight" in there for path in packed)


def _wanted(args: ModelArgs) -> Iterator[Layouts]:
    yield (["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],)
    for layer in range(args.num_hidden_layers):
        path = f"model.layers.{layer}."
        yield from family_of(args).layer_names(path, layer, args)
        yield from _wanted_mlp(f"{path}mlp.", layer, args)


def _wanted_mlp(path: str, layer: int, args: ModelArgs) -> Iterator[Layouts]:
    if layer not in args.moe_layers:
        yield _gated(path), _joined(path)
        return
    yield ([f"{path}gate.weight", f"{path}gate.e_score_correction_bias"],)
    if args.n_shared_experts:
        yield _gated(f"{path}shared_experts."), _joined(f"{path}shared_experts.")
    experts = range(args.n_routed_experts)  # perhaps without number: a config may claim anything
    separate = (name for expert in experts for name in _gated(f"{path}experts.{expert}."))
    fused = [f"{path}experts.gate_up_proj", f"{path}experts.down_proj"]
    yield _gated(f"{path}switch_mlp."), separate, fused


def _joined(path: str) -> list[str]:
    return [f"{path}gate_up_proj.weight", f"{path}down_proj.weight"]


def _gated(path: str) -> list[str]:
    return [f"{path}{projection}.weight" for projection in PROJECTIONS]
