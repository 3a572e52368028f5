"""Tiny random checkpoints of `glm5_next`, as tests/tiny_glm.py makes those of GLM-5.2.

Everything that usually begins at a plain value is random here: norms, decay rates, biases, pool embeddings,
mixes. The epsilon is large, because a sum of streams instead of their mean shows through it only.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.tiny_glm import TINY, Array, mlp_shapes

KDA, DSA = "linear_attention", "indexed_attention"
_LEFT_OUT = ("first_k_dense_replace", "rope_parameters", "head_dim", "architectures", "model_type")
FLASH: dict[str, Any] = {k: v for k, v in TINY.items() if k not in _LEFT_OUT} | {
    "architectures": ["Glm5NextForConditionalGeneration"],
    "model_type": "glm5_next_text",
    "num_hidden_layers": 5,
    "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    "layer_types": [KDA, KDA, KDA, DSA, KDA],
    "indexer_types": ["full"] * 5,
    "qk_rope_head_dim": 0,
    "index_kpool": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "linear_lower_bound": -5.0,
    "hc_mult": 4,
    "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20,
    "swiglu_limit": 1.5,
    "rms_norm_eps": 0.05,
}
SPARSE_FIRST = FLASH | {"layer_types": [DSA, KDA, DSA, KDA, DSA]}
HANDED_ON = FLASH | {
    "layer_types": [KDA, DSA, DSA, KDA, DSA],
    "indexer_types": ["full", "full", "shared", "shared", "full"],
}
WIDE_POOLS = FLASH | {"index_kpool": 8, "index_topk": 16, "layer_types": [DSA, DSA, KDA, KDA, DSA]}
FLASH_SCHEDULES = {
    "public": FLASH, "sparse_first": SPARSE_FIRST, "handed_on": HANDED_ON, "wide_pools": WIDE_POOLS,
}  # fmt: skip


def make_flash_weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """All tensors of a checkpoint's language model, experts one by one, float32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    for name, shape in flash_shapes(config):
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * noise
        elif name.endswith(("A_log", "_compress_ape")):
            weights[name] = noise
        elif name.endswith("dt_bias"):
            weights[name] = noise - 2
        elif name.endswith("_hc.scale"):
            weights[name] = 1 + 0.3 * noise
        elif name.endswith(("bias", "_hc.base")):
            weights[name] = 0.3 * noise
        elif name == "lm_head.weight":
            weights[name] = noise * np.float32(0.25 * shape[-1] ** -0.5)
        else:
            weights[name] = noise * np.float32(shape[-1] ** -0.5)
    return weights


def flash_shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, streams = c["hidden_size"], c["hc_mult"]
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        for kind in ("attn", "ffn"):
            yield f"{p}{kind}_hc.fn", ((2 + streams) * streams, streams * h)
            yield f"{p}{kind}_hc.base", ((2 + streams) * streams,)
            yield f"{p}{kind}_hc.scale", (3,)
        if c["layer_types"][i] == KDA:
            yield from _linear_shapes(c, p + "self_attn.")
        else:
            yield from _sparse_shapes(c, p + "self_attn.", c["indexer_types"][i] == "full")
        yield from mlp_shapes(c, p + "mlp.", c["mlp_layer_types"][i] == "dense")
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (c["vocab_size"], h)


def _linear_shapes(c: dict[str, Any], p: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, head, heads = c["hidden_size"], c["linear_head_dim"], c["linear_num_heads"]
    for part in "qkv":
        yield f"{p}{part}_proj.weight", (heads * head, h)
        yield f"{p}{part}_conv1d.weight", (heads * head, 1, c["linear_conv_kernel_dim"])
    for gate in "fg":
        yield f"{p}{gate}_a_proj.weight", (head, h)
        yield f"{p}{gate}_b_proj.weight", (heads * head, head)
    yield p + "dt_bias", (heads * head,)
    yield p + "A_log", (heads,)
    yield p + "b_proj.weight", (heads, h)
    yield p + "o_norm.weight", (head,)
    yield p + "o_proj.weight", (h, heads * head)


def _sparse_shapes(c: dict[str, Any], p: str, full: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, heads, nope, v = c["hidden_size"], c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
    yield p + "q_a_proj.weight", (c["q_lora_rank"], h)
    yield p + "q_a_layernorm.weight", (c["q_lora_rank"],)
    yield p + "q_b_proj.weight", (heads * nope, c["q_lora_rank"])
    yield p + "kv_a_proj_with_mqa.weight", (c["kv_lora_rank"], h)
    yield p + "kv_a_layernorm.weight", (c["kv_lora_rank"],)
    yield p + "kv_b_proj.weight", (heads * (nope + v), c["kv_lora_rank"])
    yield p + "o_proj.weight", (h, heads * v)
    if full:
        width = c["index_head_dim"]
        yield p + "indexer.wq_b.weight", (c["index_n_heads"] * width, c["q_lora_rank"])
        yield p + "indexer.wk.weight", (width, h)
        yield p + "indexer.k_norm.weight", (width,)
        yield p + "indexer.k_norm.bias", (width,)
        yield p + "indexer.weights_proj.weight", (c["index_n_heads"], h)
        yield p + "indexer.index_kpool_compress_ape", (c["index_kpool"], width)
        yield p + "indexer.index_kpool_compress_gate", (width, h)
