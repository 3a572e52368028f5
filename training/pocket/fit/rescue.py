"""A small copy of a training checkpoint, eight bits a weight, to go on from after a lost machine.

Owns that format: codes, scales and biases by parameter, in numbered .npz files. The optimiser's state is
not kept.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.pocket.network.quant import affine_codes

FILE_BYTES = 14_000_000


def shrink(state: dict[str, Any], folder: Path) -> None:
    """Writes the model of a training checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    part: dict[str, Any] = {
        "__counters__": np.array([state["step"], state["seconds"], state["tokens"]], np.float64)
    }
    size, number = 0, 0
    for name, tensor in state["model"].items():
        value = tensor.detach().float().cpu()
        pieces = value.chunk(16) if value.dim() == 3 else [value]
        for index, piece in enumerate(pieces):
            key = f"{name}|{index}"
            if piece.dim() >= 2 and "mlp.gate" not in name:
                codes, scales, biases = affine_codes(piece, 8, 64)
                part[key + "|q"] = codes.to(torch.uint8).numpy()
                part[key + "|s"] = scales.bfloat16().view(torch.int16).numpy()
                part[key + "|b"] = biases.bfloat16().view(torch.int16).numpy()
                size += piece.numel() * 68 // 64
            else:
                part[key] = piece.numpy()
                size += piece.numel() * 4
            if size > FILE_BYTES - 2_000_000:
                np.savez(folder / f"rescue-{number}.npz", **part)
                part, size, number = {}, 0, number + 1
    if part:
        np.savez(folder / f"rescue-{number}.npz", **part)


def widen(folder: Path) -> dict[str, Any]:
    """The model and the counters back from the files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("rescue-*.npz")):
        found |= dict(np.load(path))
    counters = found.pop("__counters__")
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for key in found:
        name, index, *kind = key.split("|")
        if kind in (["s"], ["b"]):
            continue
        if kind == ["q"]:
            scale, bias = (
                torch.from_numpy(found[f"{name}|{index}|{k}"]).view(torch.bfloat16).float() for k in "sb"
            )
            value = (torch.from_numpy(found[key]).float() * scale + bias).flatten(-2)
        else:
            value = torch.from_numpy(found[key])
        pieces.setdefault(name, {})[int(index)] = value
    model = {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in pieces.items()}
    return {
        "model": model,
        "step": int(counters[0]),
        "seconds": float(counters[1]),
        "tokens": int(counters[2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a training checkpoint, or a folder of rescue files with --back"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--back", action="store_true")
    args = parser.parse_args()
    if args.back:
        torch.save(widen(args.checkpoint), args.out)
    else:
        shrink(torch.load(args.checkpoint, map_location="cpu", weights_only=True), args.out)


if __name__ == "__main__":
    main()
