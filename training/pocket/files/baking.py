"""Turns a trained model into the one that ships: quantised in place, and as tensors of the MLX layout.

Owns which module is quantised how, and the names. Files are written by export.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.pocket.files.pack import pack_codes
from training.pocket.network.model import Attention, Pocket
from training.pocket.network.moe import Experts
from training.pocket.network.parts import QuantLinear
from training.pocket.network.quant import affine_codes, rounded
from training.pocket.network.settings import OTHER_BITS


@dataclass
class Stored:
    """One tensor of the file: safetensors' name for its type, and its bytes as an array."""

    dtype: str
    array: NDArray[Any]


@torch.no_grad()
def bake(model: Pocket) -> None:
    """Puts the shipped values in place of the trained ones: quantised, or rounded to bfloat16."""
    model.set_quantised(True)
    for module in model.modules():
        if isinstance(module, Attention):
            module.kv_b_proj.weight.copy_(module.kv_b_weight().clone())
            module.kv_b_proj.quantised = False
        elif isinstance(module, Experts):
            module.gate_up_proj.copy_(rounded(module.gate_up_proj, module.bits, module.group))
            module.down_proj.copy_(rounded(module.down_proj, module.bits, module.group))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and not name.endswith("kv_b_proj"):
            module.weight.copy_(module.effective().clone())
    for name, parameter in model.named_parameters():
        if "norm" in name or "mlp.gate." in name:
            parameter.copy_(parameter.bfloat16().float())
    model.set_quantised(False)


def bf16(x: Tensor) -> Stored:
    return Stored(
        "BF16", x.detach().float().cpu().bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)
    )


def quantised(name: str, weight: Tensor, bits: int, group: int) -> dict[str, Stored]:
    """Weight, scales and biases of one module."""
    codes, scales, biases = affine_codes(weight.detach().float().cpu(), bits, group)
    packed = pack_codes(codes.flatten(-2).to(torch.uint8).numpy(), bits)
    return {
        f"{name}.weight": Stored("U32", packed),
        f"{name}.scales": bf16(scales.squeeze(-1)),
        f"{name}.biases": bf16(biases.squeeze(-1)),
    }


class Layout:
    """Collects the tensors of the MLX layout and the quantisation of each module."""

    def __init__(self) -> None:
        self.tensors: dict[str, Stored] = {}
        self.overrides: dict[str, dict[str, Any]] = {}

    def add(self, name: str, weight: Tensor, bits: int, group: int = 64) -> None:
        self.tensors |= quantised(name, weight, bits, group)
        if (bits, group) != (OTHER_BITS, 64):
            self.overrides[name] = {"group_size": group, "bits": bits, "mode": "affine"}

    def quantization(self) -> dict[str, Any]:
        return {"group_size": 64, "bits": OTHER_BITS, "mode": "affine", **self.overrides}


def add_attention(layout: Layout, prefix: str, attention: Attention) -> None:
    """kv_b becomes embed_q (transposed per head) and unembed_out."""
    c = attention.c
    heads = attention.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
    key, value = heads.split([c.qk_nope_head_dim, c.v_head_dim], 1)
    bits = attention.kv_b_proj.bits
    layout.add(f"{prefix}.embed_q", key.transpose(1, 2).contiguous(), bits, min(64, c.qk_nope_head_dim))
    layout.add(f"{prefix}.unembed_out", value.contiguous(), bits)


def add_experts(layout: Layout, prefix: str, experts: Experts) -> None:
    inner = experts.gate_up_proj.shape[1] // 2
    layout.add(f"{prefix}.gate_proj", experts.gate_up_proj[:, :inner], experts.bits)
    layout.add(f"{prefix}.up_proj", experts.gate_up_proj[:, inner:], experts.bits)
    layout.add(f"{prefix}.down_proj", experts.down_proj, experts.bits)


def mlx_layout(model: Pocket) -> Layout:
    """All tensors of the trained, unbaked model under their MLX names."""
    layout = Layout()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            add_attention(layout, name, module)
        elif isinstance(module, Experts):
            add_experts(layout, name.replace(".experts", ".switch_mlp"), module)
        elif isinstance(module, QuantLinear) and not name.endswith("kv_b_proj"):
            layout.add(name, module.weight, module.bits, module.group)
    for name, parameter in model.named_parameters():
        if "norm" in name or "mlp.gate." in name:
            layout.tensors[name] = bf16(parameter)
    for name, buffer in model.named_buffers():
        layout.tensors[name] = Stored("F32", buffer.detach().float().cpu().numpy())
    return layout
