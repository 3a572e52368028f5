"""Tiny checkpoints with random bytes, written by hand, and what a correct bank must hold for them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streaming.files.headers import ITEM_BYTES

Array = npt.NDArray[np.generic]
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, data
Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
# 3-bit rows of 64, as the real experts are: 6 words, one group.
QUANTISED: Kinds = {"weight": ("U32", (32, 6)), "scales": ("BF16", (32, 1)), "biases": ("BF16", (32, 1))}
CARRIERS = {"U32": np.uint32, "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8}


def write_safetensors(path: Path, tensors: Tensors, pad: int = 0) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def write_index(directory: Path, shards: Mapping[str, Iterable[str]]) -> None:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def random_bytes(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Bytes of finite numbers: NaNs would compare unequal to themselves."""
    count = int(np.prod(shape))
    if dtype == "BF16":
        return bytes((rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    if dtype in ("F16", "F32"):
        return bytes(rng.standard_normal(count).astype(CARRIERS[dtype]))
    return rng.bytes(count * ITEM_BYTES[dtype])


def stacked(
    rng: np.random.Generator, layers: Iterable[int], num_experts: int, kinds: Kinds = QUANTISED
) -> Tensors:
    return {
        f"model.layers.{layer}.mlp.switch_mlp.{projection}.{kind}": (
            dtype,
            (num_experts, *shape),
            random_bytes(rng, dtype, (num_experts, *shape)),
        )
        for layer in layers
        for projection in ("gate_proj", "up_proj", "down_proj")
        for kind, (dtype, shape) in kinds.items()
    }


def separate(
    rng: np.random.Generator, layers: Iterable[int], num_experts: int, kinds: Kinds = QUANTISED
) -> Tensors:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.{kind}": (
            dtype,
            shape,
            random_bytes(rng, dtype, shape),
        )
        for layer in layers
        for expert in range(num_experts)
        for projection in ("gate_proj", "up_proj", "down_proj")
        for kind, (dtype, shape) in kinds.items()
    }


def as_float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    values: Array = np.frombuffer(raw, CARRIERS[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
