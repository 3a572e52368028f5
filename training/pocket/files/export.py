"""Writes the checkpoint: safetensors shards with aligned data, their index, and the two configs.

Owns the file format and the sizes. Reads a training checkpoint; needs the tokenizer for the ids of the end
tokens.
"""

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from models.pocket import FOLDER
from training.pocket.files.baking import Stored, mlx_layout
from training.pocket.fit.tokenizer import token_id
from training.pocket.network.model import Pocket
from training.pocket.network.settings import Settings, model_config

SHARD_BYTES = 14_500_000
ALIGNMENT = 4096
END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def write_shard(path: Path, tensors: dict[str, Stored]) -> None:
    """One safetensors file whose data starts on a 4,096-byte boundary."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, stored in tensors.items():
        size = stored.array.nbytes
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for stored in tensors.values():
            file.write(stored.array.tobytes())


def shards_of(tensors: dict[str, Stored]) -> list[dict[str, Stored]]:
    """Tensors in order, cut where a shard would grow over the limit."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name in sorted(tensors, key=natural_order):
        if size + tensors[name].array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].array.nbytes
    return shards


def natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the three tokens that end a turn."""
    return [token_id(tokenizer, text) for text in END_TOKENS]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_checkpoint(model: Pocket, tokenizer: Tokenizer, folder: Path) -> int:
    """Writes all files but the tokenizer and the template; gives the bytes of the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = mlx_layout(model)
    shards = shards_of(layout.tensors)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    total = sum(stored.array.nbytes for stored in layout.tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )
    ends = end_ids(tokenizer)
    quantization = layout.quantization()
    write_json(
        folder / "config.json",
        model_config(model.c, ends, quantization=quantization, quantization_config=quantization),
    )
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "temperature": 1.0,
            "top_p": 0.95,
        },
    )
    return total


def load_checkpoint(path: Path, device: str) -> Pocket:
    """The model of a training checkpoint."""
    state = torch.load(path, map_location=device, weights_only=True)
    settings = Settings(**state["settings"])
    model = Pocket(settings, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    model.load_state_dict(state["model"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--tokenizer", type=Path, default=FOLDER / "tokenizer.json")
    args = parser.parse_args()
    model = load_checkpoint(args.checkpoint, "cpu")
    total = write_checkpoint(model, Tokenizer.from_file(str(args.tokenizer)), args.out)
    print(f"{total / 1e6:.1f} MB of tensors -> {args.out}")


if __name__ == "__main__":
    main()
