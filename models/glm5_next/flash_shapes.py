"""The true shapes of GLM-5.3-Flash's language model: its config, and the tensors of a layer but its MLP's.

For plans without a byte of it. Pure, and without MLX.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_SPARSE = "indexed_attention"
GLM_5_3_FLASH: Mapping[str, Any] = {
    "model_type": "glm5_next_text", "vocab_size": 154880, "hidden_size": 4096, "num_hidden_layers": 45,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense"] + ["sparse"] * 44, "n_routed_experts": 288, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "v_head_dim": 256,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "index_kpool": 4,
    "layer_types": [_SPARSE if layer % 4 == 3 else "linear_attention" for layer in range(45)],
    "indexer_types": ["full"] * 45, "linear_head_dim": 128, "linear_num_heads": 64,
    "linear_conv_kernel_dim": 4, "linear_lower_bound": -5.0, "hc_mult": 4, "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip

Named = tuple[str, str | None, tuple[int, ...]]  # type None: packed like the rest


def layer_shapes(layer: int) -> Iterator[Named]:
    """Tensors of a layer but its norms and MLP, with the type of those that are not packed."""
    c = GLM_5_3_FLASH
    streams, hidden = c["hc_mult"], c["hidden_size"]
    for kind in ("attn", "ffn"):
        yield f"{kind}_hc.fn", "F32", ((2 + streams) * streams, streams * hidden)
        yield f"{kind}_hc.base", "F32", ((2 + streams) * streams,)
        yield f"{kind}_hc.scale", "F32", (3,)
    parts = _sparse_shapes() if c["layer_types"][layer] == _SPARSE else _linear_shapes()
    for name, kind_of_numbers, shape in parts:
        yield f"self_attn.{name}", kind_of_numbers, shape


def _linear_shapes() -> Iterator[Named]:
    c = GLM_5_3_FLASH
    hidden, head, heads = c["hidden_size"], c["linear_head_dim"], c["linear_num_heads"]
    for part in "qkv":
        yield f"{part}_proj", None, (heads * head, hidden)
        yield f"{part}_conv1d.weight", "F32", (heads * head, 1, c["linear_conv_kernel_dim"])
    for gate in "fg":
        yield f"{gate}_a_proj", None, (head, hidden)
        yield f"{gate}_b_proj", None, (heads * head, head)
    yield "b_proj", None, (heads, hidden)
    yield "o_proj", None, (hidden, heads * head)
    yield "dt_bias", "F32", (heads * head,)
    yield "A_log", "F32", (heads,)
    yield "o_norm.weight", "BF16", (head,)


def _sparse_shapes() -> Iterator[Named]:
    c = GLM_5_3_FLASH
    hidden, heads, query, latent = (
        c[name] for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, value, width = c["qk_nope_head_dim"], c["v_head_dim"], c["index_head_dim"]
    yield "q_a_proj", None, (query, hidden)
    yield "q_b_proj", None, (heads * nope, query)
    yield "kv_a_proj_with_mqa", None, (latent, hidden)
    yield "embed_q", None, (heads, latent, nope)
    yield "unembed_out", None, (heads, value, latent)
    yield "o_proj", None, (hidden, heads * value)
    yield "q_a_layernorm.weight", "BF16", (query,)
    yield "kv_a_layernorm.weight", "BF16", (latent,)
    yield "indexer.wq_b.weight", "BF16", (c["index_n_heads"] * width, query)
    yield "indexer.wk.weight", "BF16", (width, hidden)
    yield "indexer.weights_proj.weight", "BF16", (c["index_n_heads"], hidden)
    yield "indexer.k_norm.weight", "BF16", (width,)
    yield "indexer.k_norm.bias", "BF16", (width,)
    yield "indexer.index_kpool_compress_ape", "BF16", (c["index_kpool"], width)
    yield "indexer.index_kpool_compress_gate", "BF16", (width, hidden)
