"""GLM-5.2's own sizes, as its config.json has them. Used by tests and benchmarks that need no weights."""

from typing import Any

from tests.tiny_glm import SHARED

GLM52: dict[str, Any] = SHARED | {
    "vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048,
    "max_position_embeddings": 1_048_576,
}  # fmt: skip
