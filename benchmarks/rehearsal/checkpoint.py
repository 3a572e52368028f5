"""A checkpoint of GLM-5.2's true shapes whose trunk is random and whose experts are holes but for a pattern.

The files are those of `models.loading.public_formats`; what is written into their holes takes 5 to 11 GB for
the trunk. Of each part of each expert one page is written, a piece of one random pattern, so that outputs are
not zero and no two experts are alike: half a gigabyte. The tokenizer is Pocket's, filled up to GLM's size.
"""

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.loading.public_formats import GLM_5_2, PUBLIC_FORMATS, Packing, PublicFormat, write_hollow
from server.commands.checkpoint import POCKET

_FOUR = Packing(4)
FORMATS = {
    "3.5bpw": PUBLIC_FORMATS[0],
    "mxfp4": PUBLIC_FORMATS[1],
    "2.56bpw": PUBLIC_FORMATS[2],
    "4bit": PublicFormat("", 0, "", _FOUR, _FOUR, _FOUR, _FOUR),
}
PAGE, PATTERN_BYTES = 4096, 32 * 2**20
Header = dict[str, dict[str, Any]]


def write(folder: Path, form: str, num_layers: int, small_trunk: bool) -> None:
    """Writes the checkpoint; a trunk of two bits with `small_trunk`."""
    folder.mkdir(parents=True, exist_ok=True)
    one = FORMATS[form]
    if small_trunk:
        one = replace(one, rest=Packing(2), embeddings=Packing(2), indexers=Packing(2))
    write_hollow(folder, one, num_layers)
    rng = np.random.default_rng(0)
    _fill_trunk(folder / "model-trunk.safetensors", rng)
    pattern = rng.bytes(PATTERN_BYTES)
    for path in sorted(folder.glob("model-0*.safetensors")):
        _fill_experts(path, pattern)
    _write_tokenizer(folder)


def on_disk_bytes(folder: Path) -> int:
    """What the files take, without their holes."""
    return sum(path.stat().st_blocks for path in folder.iterdir()) * 512


def read_header(path: Path) -> tuple[int, Header]:
    """Where the data begins, and the tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: Header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def _fill_trunk(path: Path, rng: np.random.Generator) -> None:
    start, header = read_header(path)
    words = np.frombuffer(rng.bytes(PATTERN_BYTES), np.uint8)
    noise = rng.standard_normal(2**22, np.float32)
    with open(path, "r+b") as file:
        for name, entry in header.items():
            file.seek(start + entry["data_offsets"][0])
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            if entry["dtype"] == "U32":
                while left:
                    first = int(rng.integers(0, len(words) // 2))
                    left -= file.write(words[first : first + left].tobytes())
            else:
                file.write(_values(name, entry, header, noise))


def _values(name: str, entry: dict[str, Any], header: Header, noise: NDArray[np.float32]) -> bytes:
    """Bytes of a tensor that is no packed weight; with its values a layer keeps the size of its input."""
    shape, path = entry["shape"], name.rpartition(".")[0]
    count = prod(shape)
    normal = np.resize(noise, count)
    weight = header.get(f"{path}.weight")
    if name.endswith((".scales", ".biases")) and weight is not None:
        bits = weight["shape"][-1] * 32 // (shape[-1] * (32 if entry["dtype"] == "U8" else 64))
        width = weight["shape"][-1] * 32 // bits
        if entry["dtype"] == "U8":  # e8m0, of values whose root mean square is 2.9
            return np.full(count, 127 + round(np.log2(width**-0.5 / 2.9)), np.uint8).tobytes()
        step = width**-0.5 / ((4.0**bits - 1) / 12) ** 0.5
        values = np.full(count, step if name.endswith(".scales") else -(2**bits - 1) / 2 * step, np.float32)
    elif "norm.weight" in name:
        values = 1 + 0.1 * normal
    else:
        values = normal * np.float32(shape[-1] ** -0.5 if len(shape) > 1 else 0.02)
    if entry["dtype"] == "F32":
        return values.astype(np.float32).tobytes()
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _fill_experts(path: Path, pattern: bytes) -> None:
    """Writes the first page of each expert's part of each tensor."""
    start, header = read_header(path)
    scale = np.full(PAGE // 2, 0.02, np.float32).view(np.uint32) >> 16
    with open(path, "r+b") as file:
        for number, entry in enumerate(header.values()):
            first, end = entry["data_offsets"]
            experts = entry["shape"][0]
            nbytes = (end - first) // experts
            for expert in range(experts):
                at = (PAGE * (experts * number + expert)) % (len(pattern) - PAGE)
                page = pattern[at : at + min(PAGE, nbytes)]
                if entry["dtype"] == "U8":
                    page = (110 + (np.frombuffer(page, np.uint8) & 15)).astype(np.uint8).tobytes()
                elif entry["dtype"] == "BF16":
                    page = (scale ^ (np.frombuffer(page, np.uint16) & 0x807F)).astype(np.uint16).tobytes()
                os.pwrite(file.fileno(), page, start + first + expert * nbytes)


def _write_tokenizer(folder: Path) -> None:
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(POCKET / name, folder)
    described = json.loads((POCKET / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    used = len(vocabulary) + len(described["added_tokens"])
    vocabulary |= {f"made{number}": number for number in range(used, GLM_5_2["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
