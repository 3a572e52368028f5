"""Public checkpoints by their shapes alone: enough to plan for them without a byte of them.

`write_hollow` lays them out as files of the right headers and sizes that hold nothing and take no room; what
opens a real checkpoint opens these.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from models.dsa_family import GLM_MOE_DSA
from models.glm5_next.flash_family import GLM5_NEXT
from models.glm5_next.flash_shapes import GLM_5_3_FLASH, layer_shapes

GLM_5_2: Mapping[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "head_dim": 192,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "index_topk_freq": 4,
    "index_skip_topk_offset": 3, "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "rope_interleave": True, "indexer_rope_interleave": True,
}  # fmt: skip
_ITEM_BYTES = {"U32": 4, "U8": 1, "BF16": 2, "F32": 4}

Tensor = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed: bits and group size, in MLX's affine mode or in a mode without biases."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def tensors(self, path: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The parts of one matrix, or of a stack of them."""
        *lead, width = shape
        kind = "BF16" if self.mode == "affine" else "U8"
        yield f"{path}.weight", "U32", (*lead, width * self.bits // 32)
        yield f"{path}.scales", kind, (*lead, width // self.group_size)
        if self.mode == "affine":
            yield f"{path}.biases", kind, (*lead, width // self.group_size)

    @property
    def described(self) -> dict[str, Any]:
        """As `quantization` of config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class PublicFormat:
    """How a public repository packs routed experts, embeddings, indexers (None: bfloat16), and the rest."""

    repo: str
    disk_bytes: int
    remark: str
    experts: Packing
    rest: Packing
    embeddings: Packing
    indexers: Packing | None
    config: Mapping[str, Any] = field(default_factory=lambda: GLM_5_2)


_FOUR, _SIX, _MXFP4 = Packing(4), Packing(6), Packing(4, 32, "mxfp4")
PUBLIC_FORMATS = (
    PublicFormat(
        "avlp12/GLM-5.2-Alis-MLX-Dynamic-3.5bpw", 328 * 10**9, "experts of 3 bits",
        Packing(3), _FOUR, _SIX, None,
    ),
    PublicFormat("mlx-community/GLM-5.2-mxfp4", 395 * 10**9, "mxfp4", _MXFP4, _MXFP4, _MXFP4, _MXFP4),
    PublicFormat(
        "avlp12/GLM-5.2-Alis-MLX-Dynamic-2.56bpw", 238 * 10**9, "experts of 2 bits: reads less, writes worse",
        Packing(2), _FOUR, _SIX, None,
    ),
)  # fmt: skip


# What `glmserve convert` makes of the original.
FLASH_FORMAT = PublicFormat(
    "zai-org/GLM-5.3-Flash", 180 * 10**9, "converted to 4 bits", _FOUR, _FOUR, _FOUR, None, GLM_5_3_FLASH
)


def find_format(name: str) -> PublicFormat | None:
    """The format of a repository, or the first one for an id that a model is served by; None for others."""
    for one in (*PUBLIC_FORMATS, FLASH_FORMAT):
        if name.lower() == one.repo.lower():
            return one
    firsts = {
        _last_word(GLM_MOE_DSA.served_id): PUBLIC_FORMATS[0],
        _last_word(GLM5_NEXT.served_id): FLASH_FORMAT,
    }
    return firsts.get(_last_word(name))


def _last_word(name: str) -> str:
    return name.lower().rpartition("/")[2]


def write_hollow(directory: Path, one: PublicFormat, num_layers: int | None = None) -> Path:
    """Writes config.json and a file for the trunk and for each layer's experts, of the first layers."""
    overrides: dict[str, Any] = {}
    num_layers = num_layers or one.config["num_hidden_layers"]
    trunk = list(_trunk(one, num_layers, overrides))
    write_holes(directory / "model-trunk.safetensors", trunk)
    kinds = one.config["mlp_layer_types"][:num_layers]
    config = {**one.config, "num_hidden_layers": num_layers, "mlp_layer_types": kinds}
    for layer in range(config["first_k_dense_replace"], num_layers):
        path = directory / f"model-{layer:05}.safetensors"
        write_holes(path, list(_experts(one, f"model.layers.{layer}.mlp.switch_mlp.", overrides)))
    config["quantization"] = one.rest.described | overrides
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_holes(path: Path, tensors: list[Tensor]) -> None:
    """A file of safetensors with these tensors, whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, kind, shape in tensors:
        end = offset + prod(shape) * _ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    write_header(path, json.dumps(header).encode(), offset)


def write_header(path: Path, header: bytes, data_bytes: int) -> None:
    """A header as it stands in a file, and a hole of the data's size behind it."""
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data_bytes)


def _experts(one: PublicFormat, prefix: str, overrides: dict[str, Any]) -> Iterator[Tensor]:
    num, hidden, width = (
        one.config[name] for name in ("n_routed_experts", "hidden_size", "moe_intermediate_size")
    )
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield from _packed(one, one.experts, f"{prefix}{part}_proj", (num, *shape), overrides)


def _packed(
    one: PublicFormat, packing: Packing, path: str, shape: tuple[int, ...], overrides: dict[str, Any]
) -> Iterator[Tensor]:
    if packing != one.rest:
        overrides[path] = packing.described
    return packing.tensors(path, shape)


def _trunk(one: PublicFormat, num_layers: int, overrides: dict[str, Any]) -> Iterator[Tensor]:
    hidden, vocab = one.config["hidden_size"], one.config["vocab_size"]
    for path in ("model.embed_tokens", "lm_head"):
        yield from _packed(one, one.embeddings, path, (vocab, hidden), overrides)
    yield "model.norm.weight", "BF16", (hidden,)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", "BF16", (hidden,)
        if one.config is GLM_5_3_FLASH:
            yield from _flash(one, layer)
        else:
            yield from _latent(one, layer, overrides)
        yield from _mlp(one, layer)


def _flash(one: PublicFormat, layer: int) -> Iterator[Tensor]:
    for name, kind, shape in layer_shapes(layer):
        path = f"model.layers.{layer}.{name}"
        if kind is None:
            yield from one.rest.tensors(path, shape)
        else:
            yield path, kind, shape


def _latent(one: PublicFormat, layer: int, overrides: dict[str, Any]) -> Iterator[Tensor]:
    prefix = f"model.layers.{layer}.self_attn."
    for name, shape in _attention():
        yield from one.rest.tensors(prefix + name, shape)
    for name, width in (("q_a_layernorm", "q_lora_rank"), ("kv_a_layernorm", "kv_lora_rank")):
        yield f"{prefix}{name}.weight", "BF16", (GLM_5_2[width],)
    yield from _indexer(one, layer, overrides)


def _attention() -> Iterator[tuple[str, tuple[int, ...]]]:
    c = GLM_5_2
    hidden, heads, rope, value = (
        c[name] for name in ("hidden_size", "num_attention_heads", "qk_rope_head_dim", "v_head_dim")
    )
    nope, query, latent = c["qk_nope_head_dim"], c["q_lora_rank"], c["kv_lora_rank"]
    yield "q_a_proj", (query, hidden)
    yield "q_b_proj", (heads * (nope + rope), query)
    yield "kv_a_proj_with_mqa", (latent + rope, hidden)
    yield "embed_q", (heads, latent, nope)
    yield "unembed_out", (heads, value, latent)
    yield "o_proj", (hidden, heads * value)


def _indexer(one: PublicFormat, layer: int, overrides: dict[str, Any]) -> Iterator[Tensor]:
    c = GLM_5_2
    if max(layer - c["index_skip_topk_offset"] + 1, 0) % c["index_topk_freq"]:
        return
    prefix, width = f"model.layers.{layer}.self_attn.indexer.", c["index_head_dim"]
    shapes = {
        "wq_b": (c["index_n_heads"] * width, c["q_lora_rank"]),
        "wk": (width, c["hidden_size"]),
        "weights_proj": (c["index_n_heads"], c["hidden_size"]),
    }
    for name, shape in shapes.items():
        if one.indexers is None:
            yield f"{prefix}{name}.weight", "BF16", shape
        else:
            yield from _packed(one, one.indexers, prefix + name, shape, overrides)
    yield f"{prefix}k_norm.weight", "BF16", (width,)
    yield f"{prefix}k_norm.bias", "BF16", (width,)


def _mlp(one: PublicFormat, layer: int) -> Iterator[Tensor]:
    c, prefix = one.config, f"model.layers.{layer}.mlp."
    is_dense = layer < c["first_k_dense_replace"]
    width = c["intermediate_size"] if is_dense else c["moe_intermediate_size"] * c["n_shared_experts"]
    if not is_dense:
        yield f"{prefix}gate.weight", "BF16", (c["n_routed_experts"], c["hidden_size"])
        yield f"{prefix}gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
        prefix += "shared_experts."
    for part in ("gate", "up"):
        yield from one.rest.tensors(f"{prefix}{part}_proj", (width, c["hidden_size"]))
    yield from one.rest.tensors(f"{prefix}down_proj", (c["hidden_size"], width))
