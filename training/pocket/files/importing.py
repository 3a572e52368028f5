"""Reads the shipped files back into the torch model, every weight as the file gives it.

Owns the way back from the MLX layout: the evaluation in torch, and training that goes on from a shipped
Pocket.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.pocket.files.pack import unpack_codes
from training.pocket.network.model import Pocket
from training.pocket.network.settings import Settings

DTYPES: dict[str, Any] = {"U32": np.uint32, "F32": np.float32, "BF16": np.uint16}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the shards; bfloat16 becomes float32, packed words stay words."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        blob = path.read_bytes()
        (size,) = struct.unpack("<Q", blob[:8])
        for name, entry in json.loads(blob[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            array = np.frombuffer(blob[8 + size + start : 8 + size + end], DTYPES[entry["dtype"]]).reshape(
                entry["shape"]
            )
            if entry["dtype"] == "BF16":
                found[name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
            else:
                found[name] = torch.from_numpy(array.copy())
    return found


def dequantised(tensors: dict[str, Tensor], name: str, bits: int, group: int) -> Tensor:
    codes = torch.from_numpy(unpack_codes(tensors[f"{name}.weight"].numpy(), bits).astype(np.float32))
    scales, biases = tensors[f"{name}.scales"].unsqueeze(-1), tensors[f"{name}.biases"].unsqueeze(-1)
    return (codes.unflatten(-1, (-1, group)) * scales + biases).flatten(-2)


def trained_names(weights: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """From the MLX names to those of the torch model: kv_b joined again, gate and up fused."""
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("embed_q.weight"):
            other = weights[name.replace("embed_q", "unembed_out")]
            joined = torch.cat([value.transpose(1, 2), other], 1)
            state[name.replace("embed_q", "kv_b_proj")] = joined.reshape(-1, settings.kv_lora_rank)
        elif name.endswith("switch_mlp.gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            state[name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")] = torch.cat(
                [value, up], 1
            )
        elif name.endswith("switch_mlp.down_proj.weight"):
            state[name.replace("switch_mlp.down_proj.weight", "experts.down_proj")] = value
        elif "unembed_out" not in name and "switch_mlp" not in name:
            state[name] = value
    return state


def load_shipped(folder: Path, device: str, settings: Settings | None = None) -> Pocket:
    """The torch model with the shipped weights."""
    settings = settings or Settings()
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = read_tensors(folder)
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" in tensors and name.endswith(".weight"):
            how = quantization.get(base, quantization)
            weights[name] = dequantised(tensors, base, how["bits"], how["group_size"])
        elif not name.endswith((".scales", ".biases")):
            weights[name] = value
    model = Pocket(settings, torch.bfloat16 if device == "cuda" else torch.float32)
    model.load_state_dict(trained_names(weights, settings))
    return model.to(device)
