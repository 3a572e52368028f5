"""GLM-5.3-Flash as a family: the half that computes."""

from collections.abc import Mapping
from typing import cast

import mlx.core as mx

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.computing import CacheBytes, Computing, MakeExperts
from models.dsa_computing import FLOAT32
from models.glm5_next.flash_args import FlashArgs
from models.glm5_next.flash_memory import sweep_row_bytes, workspace_bytes
from models.glm5_next.flash_model import FlashModel
from models.glm_moe_dsa import Model
from models.loading.tensor_names import to_model_names

_EXACT = (
    "_hc.fn", "_hc.base", "_hc.scale", "_conv1d.weight", ".dt_bias", ".A_log", ".o_norm.weight",
    ".index_kpool_compress_ape",
)  # fmt: skip


def make_model(args: ModelArgs, arithmetic: Arithmetic, make_experts: MakeExperts) -> Model:
    """A model of placeholders."""
    return FlashModel(cast(FlashArgs, args), arithmetic, make_experts)


def flash_names(tensors: Mapping[str, mx.array], args: ModelArgs) -> dict[str, mx.array]:
    """As `to_model_names`; matrices that a converter put one under the other are parted again.

    A convolution's weight is [channels, 1, kernel], in MLX's layout [channels, kernel, 1].
    """
    out: dict[str, mx.array] = {}
    for name, tensor in to_model_names(tensors, args).items():
        if "conv1d.weight" in name and tensor.ndim == 3 and tensor.shape[1] != 1:
            tensor = tensor.swapaxes(1, 2)
        out |= _parted(name, tensor, cast(FlashArgs, args))
    return out


def _parted(name: str, tensor: mx.array, args: FlashArgs) -> dict[str, mx.array]:
    """The tensors that one holds, rows one under the other: mostly itself."""
    path, _, kind = name.rpartition(".")
    room, _, module = path.rpartition(".")
    parts = _joined_modules(args).get(module)
    if parts is None or tensor.shape[0] != sum(rows or tensor.shape[0] // 2 for rows in parts.values()):
        return {name: tensor}
    out, start = {}, 0
    for part, rows in parts.items():
        stop = start + (rows or tensor.shape[0] // 2)
        out[f"{room}.{part}.{kind}"] = mx.contiguous(tensor[start:stop])
        start = stop
    return out


def _joined_modules(args: FlashArgs) -> dict[str, dict[str, int]]:
    """Modules that mlx-vlm and transformers join, with the rows of each; 0 stands for a half."""
    width, head, heads = args.linear_dim, args.linear_head_dim, args.linear_num_heads
    return {
        "conv1d": {f"{one}_conv1d": width for one in "qkv"},
        "qkv_proj": {f"{one}_proj": width for one in "qkv"},
        "fbg_a_proj": {"f_a_proj": head, "b_proj": heads, "g_a_proj": head},
        "qkv_a_proj": {"q_a_proj": args.q_lora_rank, "kv_a_proj_with_mqa": args.latent_dim},
        "gate_up_proj": {"gate_proj": 0, "up_proj": 0},
    }


def cache_bytes(args: ModelArgs, itemsize: int) -> CacheBytes:
    """What a token takes in the sparse layers, and the states of all layers."""
    flash = cast(FlashArgs, args)
    pooled = flash.index_head_dim * len(flash.full_layers) * itemsize
    heads, width = flash.linear_num_heads, flash.linear_head_dim
    inputs = (flash.linear_conv_kernel_dim - 1) * 3 * flash.linear_dim * itemsize
    raw = (flash.index_kpool - 1) * 2 * pooled
    state = len(flash.linear_layers) * (heads * width * width * 4 + inputs) + raw
    latents = flash.kv_lora_rank * len(flash.sparse_layers) * itemsize
    return CacheBytes(latents, -(-pooled // flash.index_kpool), state)


COMPUTING = Computing(
    make_model, flash_names, FLOAT32 + _EXACT, cache_bytes, workspace_bytes, sweep_row_bytes
)
