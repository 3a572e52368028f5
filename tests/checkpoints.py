"""Small quantised checkpoints in MLX's layout, written from the tiny random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from models.args import ModelArgs
from models.arithmetic import CPU, Arithmetic, Quantization
from models.attention.attention import Span
from models.families import parse_args
from models.glm_moe_dsa import Model
from models.loading.loading import Checkpoint, load_model, open_checkpoint
from models.loading.tensor_names import split_kv_b
from streaming.disk.disk import Disk
from streaming.store import ExpertStore
from tests.tiny_glm import Array, save_config

Choose = Callable[[str], Quantization | None]


def save_packed(directory: Path, config: dict[str, Any], weights: dict[str, Array], choose: Choose) -> Path:
    """Write the weights stacked and packed; `choose` says how a module path is packed (None: bfloat16).

    The router stays as it is, as in the public checkpoints.
    """
    args = parse_args(config)
    out: dict[str, mx.array] = {}
    overrides: dict[str, Any] = {}
    for name, tensor in _mlx_layout(weights, args).items():
        path, _, kind = name.rpartition(".")
        is_matrix = kind == "weight" and tensor.ndim > 1 and not path.endswith("mlp.gate")
        packing = choose(path) if is_matrix else None
        if packing is None:
            keep = name.endswith(("e_score_correction_bias", "gate.weight"))
            out[name] = tensor if keep else tensor.astype(mx.bfloat16)
            continue
        packed = mx.quantize(tensor.astype(mx.bfloat16), packing.group_size, packing.bits, packing.mode)
        out |= {f"{path}.{part}": a for part, a in zip(("weight", "scales", "biases"), packed, strict=False)}
        overrides[path] = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    directory.mkdir(parents=True, exist_ok=True)
    save_config(directory, config | {"quantization": {"group_size": 64, "bits": 4} | overrides})
    mx.save_safetensors(str(directory / "model.safetensors"), out, {"format": "mlx"})
    return directory


def _mlx_layout(weights: dict[str, Array], args: ModelArgs) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    for name, w in weights.items():
        if ".experts." in name:
            continue
        if name.endswith("kv_b_proj.weight"):
            prefix = name.removesuffix("kv_b_proj.weight")
            embed_q, unembed_out = split_kv_b(mx.array(w), args)
            out |= {prefix + "embed_q.weight": embed_q, prefix + "unembed_out.weight": unembed_out}
        else:
            out[name] = mx.array(w)
    for layer in args.moe_layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [
                f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for e in range(args.n_routed_experts)
            ]
            out[f"model.layers.{layer}.mlp.switch_mlp.{part}.weight"] = mx.stack(
                [mx.array(weights[name]) for name in names]
            )
    return out


@dataclass(frozen=True)
class Opened:
    """A checkpoint opened through the product's own path."""

    checkpoint: Checkpoint
    store: ExpertStore
    model: Model


def open_model(
    directory: Path,
    slots: int | None = None,
    arithmetic: Arithmetic = CPU,
    *,
    looks_ahead: bool = True,
    disk: Disk | None = None,
    make_store: Callable[..., ExpertStore] = ExpertStore,
) -> Opened:
    """The model of a folder; `slots` None: all experts resident, else so many per layer."""
    checkpoint = open_checkpoint(directory)
    num_slots = checkpoint.args.n_routed_experts if slots is None else slots
    store = make_store(
        checkpoint.experts, num_slots, float_dtype=arithmetic.dtype, looks_ahead=looks_ahead, disk=disk
    )
    if slots is None:
        store.load_all()
    return Opened(checkpoint, store, load_model(checkpoint, arithmetic, store))


def greedy(model: Model, prompt: list[int], num_tokens: int) -> tuple[list[int], mx.array]:
    """Greedy tokens, and the logits of every step [num_tokens, V]."""
    cache, ids, rows = model.make_cache(), prompt, []
    out: list[int] = []
    for _ in range(num_tokens):
        hidden = model(mx.array(ids), [Span(cache, 0, len(ids))])
        rows.append(model.logits(hidden[-1:])[0])
        ids = [int(rows[-1].argmax())]
        out += ids
    return out, mx.stack(rows)
