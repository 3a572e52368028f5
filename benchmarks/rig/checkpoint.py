"""Random checkpoints of the benchmarks' geometry, written at the speed of the disk.

Every matrix is 4 bit in groups of 64, its packed words drawn at random; scales and biases are such that its
values have the usual variance. Experts of 8 bits, where asked for, have values sixteen times as large.
`python -m benchmarks.rig.checkpoint DIR` writes one.
"""

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_glm import SHARED, tensor_shapes

GROUP = 64
# Hidden 1024, 16 layers (3 dense), 64 experts top-8; an expert is 1.05 MiB.
BENCH: dict[str, Any] = SHARED | {
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 2048,
    "moe_intermediate_size": 640, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 13,
    "n_routed_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "head_dim": 64,
    "v_head_dim": 64, "index_head_dim": 64, "index_topk": 2048, "max_position_embeddings": 8192,
}  # fmt: skip
_ITEM_BYTES = {"U32": 4, "BF16": 2, "F32": 4}


def write_checkpoint(
    directory: Path, config: dict[str, Any] = BENCH, seed: int = 0, expert_bits: int = 4
) -> Path:
    """Writes config.json and one file for the trunk and one for each sparse layer."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {n: s for n, s in tensor_shapes(config) if ".experts." not in n}
    _write_file(
        directory / "model-trunk.safetensors", [t for n, s in shapes.items() for t in _tensors(n, s)], rng
    )
    experts, hidden, width = (config[k] for k in ("n_routed_experts", "hidden_size", "moe_intermediate_size"))
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.switch_mlp."
        of = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        tensors = [t for p, s in of.items() for t in _packed(f"{prefix}{p}", (experts, *s), expert_bits)]
        _write_file(directory / f"model-{layer:05}.safetensors", tensors, rng)
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization": {"group_size": GROUP, "bits": 4}})
    )
    return directory


_Tensor = tuple[str, str, tuple[int, ...]]


def _tensors(name: str, shape: tuple[int, ...]) -> Iterator[_Tensor]:
    is_packed = len(shape) > 1 and not name.endswith(("mlp.gate.weight", "kv_b_proj.weight"))
    if is_packed:
        yield from _packed(name.removesuffix(".weight"), shape)
    else:
        yield name, "F32" if ".gate." in name else "BF16", shape


def _packed(path: str, shape: tuple[int, ...], bits: int = 4) -> Iterator[_Tensor]:
    *lead, width = shape
    yield f"{path}.weight", "U32", (*lead, width * bits // 32)
    yield f"{path}.scales", "BF16", (*lead, width // GROUP)
    yield f"{path}.biases", "BF16", (*lead, width // GROUP)


def _write_file(path: Path, tensors: list[_Tensor], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            file.write(_values(name, dtype, shape, rng))


def _values(name: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    if dtype == "U32":
        return rng.bytes(prod(shape) * 4)
    width = shape[-1] * GROUP if name.endswith(("scales", "biases")) else shape[-1]
    noise = rng.standard_normal(prod(shape), np.float32)
    # Sixteen even steps have a standard deviation of 4.6 steps.
    step = np.float32(width**-0.5 / 4.6)
    if name.endswith("scales"):
        values = step * (1 + 0.1 * noise)
    elif name.endswith("biases"):
        values = np.full(prod(shape), -7.5 * step, np.float32)
    elif name.endswith("norm.weight"):
        values = 1 + 0.1 * noise
    else:
        values = noise * np.float32(width**-0.5 if len(shape) > 1 else 0.02)
    if dtype == "F32":
        return values.astype(np.float32).tobytes()
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=BENCH["n_routed_experts"])
    given = parser.parse_args()
    print(write_checkpoint(given.directory, BENCH | {"n_routed_experts": given.experts}))


if __name__ == "__main__":
    main()
