"""Tiny random GLM checkpoints, made from a seed by numpy alone, in the layouts that transformers saves.

The names and shapes are those of transformers' `GlmMoeDsaForCausalLM`. Norms, biases and the router's
correction bias are random too: their usual initial values (1, 0, 0) would hide faults. Sixteen index heads,
because with few heads exact zero ties decide the selection (reference, section 15).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float32]

TINY: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 11,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 3,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 12,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": [1, 2, 3],
    "pad_token_id": 1,
}
SHARED = TINY | {"index_topk_freq": 4, "index_skip_topk_offset": 3}
ALL_FULL = dict(TINY)
# Wide enough to pack, with more experts: for streaming.
WIDER = SHARED | {
    "hidden_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip
SCHEDULES = {"shared": SHARED, "all_full": ALL_FULL}


def full_layers(config: dict[str, Any]) -> list[int]:
    freq, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    return [i for i in range(config["num_hidden_layers"]) if max(i - offset + 1, 0) % freq == 0]


def make_weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """All tensors of a checkpoint, experts one by one, float32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, shape in tensor_shapes(config):
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            weights[name] = 0.1 * noise
        elif name == "lm_head.weight":  # logits of about unit size: float32 rounding alone stays under 1e-5
            weights[name] = noise * np.float32(0.25 * shape[-1] ** -0.5)
        else:
            weights[name] = noise * np.float32(shape[-1] ** -0.5)
    return weights


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    c, h = config, config["hidden_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (h,)
        yield prefix + "post_attention_layernorm.weight", (h,)
        yield from _attention_shapes(c, prefix + "self_attn.", i in full_layers(c))
        yield from mlp_shapes(c, prefix + "mlp.", i < c["first_k_dense_replace"])
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (c["vocab_size"], h)


def _attention_shapes(c: dict[str, Any], p: str, full: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    nope, v, q_lora, kv_lora = c["qk_nope_head_dim"], c["v_head_dim"], c["q_lora_rank"], c["kv_lora_rank"]
    yield p + "q_a_proj.weight", (q_lora, h)
    yield p + "q_a_layernorm.weight", (q_lora,)
    yield p + "q_b_proj.weight", (heads * (nope + rope), q_lora)
    yield p + "kv_a_proj_with_mqa.weight", (kv_lora + rope, h)
    yield p + "kv_a_layernorm.weight", (kv_lora,)
    yield p + "kv_b_proj.weight", (heads * (nope + v), kv_lora)
    yield p + "o_proj.weight", (h, heads * v)
    if full:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        yield p + "indexer.wq_b.weight", (index_heads * index_dim, q_lora)
        yield p + "indexer.wk.weight", (index_dim, h)
        yield p + "indexer.k_norm.weight", (index_dim,)
        yield p + "indexer.k_norm.bias", (index_dim,)
        yield p + "indexer.weights_proj.weight", (index_heads, h)


def mlp_shapes(c: dict[str, Any], p: str, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a layer's MLP, which begin with `p`: of its experts, or of a dense one."""
    h, width = c["hidden_size"], c["moe_intermediate_size"]
    if dense:
        yield from glu_shapes(p, h, c["intermediate_size"])
        return
    yield p + "gate.weight", (c["n_routed_experts"], h)
    yield p + "gate.e_score_correction_bias", (c["n_routed_experts"],)
    for e in range(c["n_routed_experts"]):
        yield from glu_shapes(f"{p}experts.{e}.", h, width)
    yield from glu_shapes(p + "shared_experts.", h, width * c["n_shared_experts"])


def glu_shapes(p: str, h: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield p + "gate_proj.weight", (width, h)
    yield p + "up_proj.weight", (width, h)
    yield p + "down_proj.weight", (h, width)


def fuse_experts(weights: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """transformers 5's own layout: gate_up_proj [E, 2I, H] with the gate first, down_proj [E, H, I]."""
    out = {name: w for name, w in weights.items() if ".experts." not in name}
    for i in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        p = f"model.layers.{i}.mlp.experts."
        of = {
            part: [weights[f"{p}{e}.{part}_proj.weight"] for e in range(config["n_routed_experts"])]
            for part in ("gate", "up", "down")
        }
        out[p + "gate_up_proj"] = np.concatenate([np.stack(of["gate"]), np.stack(of["up"])], axis=1)
        out[p + "down_proj"] = np.stack(of["down"])
    return out


def save_checkpoint(directory: Path, config: dict[str, Any], weights: dict[str, Array]) -> Path:
    """Write config.json and two shards with their index, as transformers does."""
    directory.mkdir(parents=True, exist_ok=True)
    save_config(directory, config)
    names = sorted(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map: dict[str, str] = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({n: np.ascontiguousarray(weights[n]) for n in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def save_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def tokens(config: dict[str, Any], length: int, seed: int = 7) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(0, config["vocab_size"], length)]
