"""Writes a checkpoint of GLM-5.2's shapes with random weights: `python -m benchmarks.gpu.true_shapes FOLDER`.

With `--holes` the experts are holes in sparse files, read as zeros at no cost of disk: GLM-5.2 whole takes
10.6 GB (`--layers 78 --dense 3 --share --holes --mode mxfp4`), six layers with random experts 29 GB.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "vocab_size": 154880,
    "hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_attention_heads": 64,
    "num_key_value_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "head_dim": 192, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128,
    "index_topk": 2048, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "attention_bias": False,
    "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"}, "hidden_act": "silu",
    "tie_word_embeddings": False, "eos_token_id": [1, 2, 3], "pad_token_id": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "moe_layer_freq": 1, "indexer_rope_interleave": True,
}  # fmt: skip
ITEM_BYTES = {"U32": 4, "BF16": 2, "U8": 1}
PAGE_BYTES = 16384
Shape = tuple[int, ...]


class Writer:
    """One checkpoint in MLX's layout: files, their index, and how what is packed is packed."""

    def __init__(self, folder: Path, layers: int, dense: int, shares: bool) -> None:
        self.folder, self.config = folder, dict(CONFIG)
        self.config |= {"num_hidden_layers": layers, "first_k_dense_replace": dense}
        self.config["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
        if shares:
            self.config |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
        self.config["quantization"] = {"group_size": 64, "bits": 4}
        self.full = [i for i in range(layers) if not shares or max(i - 2, 0) % 4 == 0]
        self._places: dict[str, str] = {}
        self._num_bytes = 0

    def save(self, name: str, tensors: dict[str, mx.array]) -> None:
        mx.eval(tensors)
        mx.save_safetensors(str(self.folder / name), tensors, {"format": "mlx"})
        self._places |= dict.fromkeys(tensors, name)
        self._num_bytes += sum(array.nbytes for array in tensors.values())

    def save_holes(self, name: str, entries: list[tuple[str, str, Shape]]) -> None:
        """A file whose tensors (name, type, shape) are zeros that take no room."""
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        for tensor, dtype, shape in entries:
            size = ITEM_BYTES[dtype] * shape[0] * shape[1] * shape[2]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
            self._places[tensor] = name
        raw = json.dumps(header).encode()
        raw += b" " * (-(len(raw) + 8) % PAGE_BYTES)
        with open(self.folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + at)
        self._num_bytes += at

    def finish(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=1))
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        on_disk = sum(file.stat().st_blocks for file in self.folder.iterdir()) * 512
        print(f"{self.folder}: {self._num_bytes / 1e9:.1f} GB, {on_disk / 1e9:.1f} GB of them on disk")


def packed(name: str, shape: Shape, scale: float | None = None) -> dict[str, mx.array]:
    """A random matrix in affine 4 bit."""
    values = mx.random.normal(shape, dtype=mx.bfloat16) * (scale or shape[-1] ** -0.5)
    parts = zip(("weight", "scales", "biases"), mx.quantize(values, 64, 4), strict=True)
    return {f"{name}.{part}": array for part, array in parts}


def norm(size: int) -> mx.array:
    return 1 + 0.1 * mx.random.normal((size,), dtype=mx.float32).astype(mx.bfloat16)


def attention(prefix: str, is_full: bool) -> dict[str, mx.array]:
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    shapes: dict[str, Shape] = {
        "q_a_proj": (2048, hidden), "q_b_proj": (heads * 256, 2048), "kv_a_proj_with_mqa": (576, hidden),
        "embed_q": (heads, 512, 192), "unembed_out": (heads, 256, 512), "o_proj": (hidden, heads * 256),
    }  # fmt: skip
    if is_full:
        shapes |= {"indexer.wq_b": (4096, 2048), "indexer.wk": (128, hidden)}
        shapes["indexer.weights_proj"] = (32, hidden)
    tensors: dict[str, mx.array] = {}
    for name, shape in shapes.items():
        tensors |= packed(f"{prefix}.{name}", shape)
    tensors[f"{prefix}.q_a_layernorm.weight"] = norm(2048)
    tensors[f"{prefix}.kv_a_layernorm.weight"] = norm(512)
    if is_full:
        tensors[f"{prefix}.indexer.k_norm.weight"] = norm(128)
        tensors[f"{prefix}.indexer.k_norm.bias"] = norm(128) - 1
    return tensors


def mlp(prefix: str, width: int) -> dict[str, mx.array]:
    hidden = CONFIG["hidden_size"]
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {key: a for name, shape in shapes.items() for key, a in packed(f"{prefix}.{name}", shape).items()}


def expert_holes(prefix: str, mode: str) -> Iterator[tuple[str, str, Shape]]:
    group_size = 64 if mode == "affine" else 32
    for name, rows, width in (("gate_proj", 2048, 6144), ("up_proj", 2048, 6144), ("down_proj", 6144, 2048)):
        yield f"{prefix}.{name}.weight", "U32", (256, rows, width // 8)
        yield (
            f"{prefix}.{name}.scales",
            "BF16" if mode == "affine" else "U8",
            (256, rows, width // group_size),
        )
        if mode == "affine":
            yield f"{prefix}.{name}.biases", "BF16", (256, rows, width // group_size)


def write_layer(writer: Writer, layer: int, is_dense: bool, holes: bool, mode: str) -> None:
    prefix, hidden = f"model.layers.{layer}", CONFIG["hidden_size"]
    tensors = attention(f"{prefix}.self_attn", layer in writer.full)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = norm(hidden)
    if is_dense:
        writer.save(f"model-trunk-{layer:03d}.safetensors", tensors | mlp(f"{prefix}.mlp", 12288))
        return
    tensors |= mlp(f"{prefix}.mlp.shared_experts", 2048)
    tensors[f"{prefix}.mlp.gate.weight"] = mx.random.normal((256, hidden)).astype(mx.bfloat16) * hidden**-0.5
    tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = 0.02 * mx.random.normal((256,))
    writer.save(f"model-trunk-{layer:03d}.safetensors", tensors)
    experts, name = f"{prefix}.mlp.switch_mlp", f"model-experts-{layer:03d}.safetensors"
    if holes:
        writer.save_holes(name, list(expert_holes(experts, mode)))
        if mode != "affine":
            form = {"group_size": 32, "bits": 4, "mode": mode}
            projections = ("gate_proj", "up_proj", "down_proj")
            writer.config["quantization"] |= {f"{experts}.{projection}": form for projection in projections}
        return
    shapes = {
        "gate_proj": (256, 2048, hidden),
        "up_proj": (256, 2048, hidden),
        "down_proj": (256, hidden, 2048),
    }
    stacked: dict[str, mx.array] = {}
    for projection, shape in shapes.items():
        stacked |= packed(f"{experts}.{projection}", shape)
    writer.save(name, stacked)
    mx.clear_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dense", type=int, default=1, help="leading layers without experts")
    parser.add_argument("--share", action="store_true", help="indexers as in GLM-5.2, not in every layer")
    parser.add_argument("--holes", action="store_true", help="experts are zeros that take no room on disk")
    parser.add_argument("--mode", choices=("affine", "mxfp4"), default="affine", help="of experts as holes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    writer = Writer(options.folder, options.layers, options.dense, options.share)
    vocab, hidden = CONFIG["vocab_size"], CONFIG["hidden_size"]
    ends = packed("model.embed_tokens", (vocab, hidden), 1.0) | packed("lm_head", (vocab, hidden))
    writer.save("model-trunk-ends.safetensors", ends | {"model.norm.weight": norm(hidden)})
    for layer in range(options.layers):
        write_layer(writer, layer, layer < options.dense, options.holes, options.mode)
    writer.finish()


if __name__ == "__main__":
    main()
