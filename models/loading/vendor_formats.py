"""Quantised formats of other engines, told apart by name: they can be neither served nor converted here.

Pure, and without MLX. Known are the words of config.json and its neighbours, and names of tensors where no
file says a word.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config.errors import CheckpointError
from streaming.files.headers import TensorEntry

# Other names are shown as they are written.
_SPELLINGS = {
    "awq": "AWQ", "gptq": "GPTQ", "exl2": "EXL2", "exl3": "EXL3", "modelopt": "ModelOpt", "hqq": "HQQ",
    "aqlm": "AQLM", "quark": "Quark", "auto-round": "AutoRound", "gguf": "GGUF", "mxfp4": "MXFP4",
    "int8": "INT8",
}  # fmt: skip
_Described = tuple[Mapping[str, Any], str | None]  # and the method, where that is known by the file
_CONVERTED = "fp8"
# Files that quantisers of old wrote beside config.json, and what they mean when they do not say it.
_NEIGHBOURS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# The last words of tensors' names, the more telling ones first.
_SUFFIXES = {
    "g_idx": "GPTQ", "qzeros": "AWQ or GPTQ", "qweight": "AWQ or GPTQ", "weight_packed": "compressed-tensors",
    "weight_scale_2": "ModelOpt NVFP4", "trellis": "EXL3", "suh": "EXL3", "q_weight": "EXL2",
    "absmax": "bitsandbytes", "SCB": "bitsandbytes INT8", "W_q": "HQQ", "codebooks": "AQLM",
    "gate_up_proj_blocks": "MXFP4", "weight_scale": "compressed-tensors or ModelOpt",
}  # fmt: skip


def refuse_vendor_format(
    directory: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> None:
    """CheckpointError, with the name of the format, for weights that another engine packed."""
    label = _named_by_files(directory, config) or _named_by_tensors(entries)
    if label:
        raise CheckpointError(
            f"{directory}: the weights are quantised as {label}, which can be neither served nor made "
            "servable here; take a checkpoint in MLX's own format, such as mlx-community/GLM-5.2-mxfp4"
        )


def _named_by_files(directory: Path, config: Mapping[str, Any]) -> str | None:
    own = config.get("quantization")
    if isinstance(own, Mapping) and "quant_method" not in own:
        return None  # MLX's own word; what stands beside it is of the original
    for described, unsaid in _descriptions(directory, config):
        if label := _label(described, unsaid):
            return label
    return None


def _descriptions(directory: Path, config: Mapping[str, Any]) -> Iterator[_Described]:
    for name in ("quantization", "quantization_config", "compression_config", "quant_config"):
        if isinstance(described := config.get(name), Mapping):
            yield described, None
    for name, method in _NEIGHBOURS.items():
        try:
            content = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, Mapping):
            inner = content.get("quantization")
            yield (inner if isinstance(inner, Mapping) else content), method


def _label(described: Mapping[str, Any], unsaid: str | None) -> str | None:
    """`ModelOpt NVFP4`: the method and what is said of its form; None for FP8 in blocks and for MLX's own."""
    method = described.get("quant_method") or unsaid or _implied(described)
    if not isinstance(method, str) or method.lower() == _CONVERTED:
        return None
    form = described.get("quant_algo") or described.get("format") or _integers(described)
    words = [_SPELLINGS.get(method.lower(), method), *([form] if isinstance(form, str) else [])]
    return " ".join(words)[:80]


def _implied(described: Mapping[str, Any]) -> str | None:
    """The method that words of its own betray."""
    if "quant_algo" in described:
        return "modelopt"
    return "bitsandbytes" if {"load_in_8bit", "load_in_4bit"} & described.keys() else None


def _integers(described: Mapping[str, Any]) -> str | None:
    """`INT8`, from how bitsandbytes and compressed-tensors count bits."""
    for flag, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
        if described.get(flag) is True:
            return f"INT{bits}"
    count = described.get("bits")
    return f"INT{count}" if type(count) is int else None


def _named_by_tensors(entries: Mapping[str, TensorEntry]) -> str | None:
    ends = {name.rpartition(".")[2] for name in entries}
    for suffix, label in _SUFFIXES.items():
        if suffix in ends:
            return label
    weights = (entry for name, entry in entries.items() if name.endswith(".weight"))
    return "INT8" if any(entry.dtype == "I8" for entry in weights) else None
