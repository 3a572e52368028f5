"""Pocket's geometry and the numbers of bits of its quantised form, as config.json has them."""

from dataclasses import asdict, dataclass, field
from typing import Any

EXPERT_BITS = 3
OTHER_BITS = 6


@dataclass(frozen=True)
class Settings:
    """The fields of config.json that shape the model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 9
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    n_routed_experts: int = 64
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.5
    index_n_heads: int = 16
    index_head_dim: int = 64
    index_topk: int = 256
    index_topk_freq: int = 4
    index_skip_topk_offset: int = 3
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    indexer_types: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.indexer_types:
            steps = (max(i - self.index_skip_topk_offset + 1, 0) for i in range(self.num_hidden_layers))
            types = ["shared" if step % self.index_topk_freq else "full" for step in steps]
            object.__setattr__(self, "indexer_types", types)


def model_config(c: Settings, eos_ids: list[int], **extra: Any) -> dict[str, Any]:
    """config.json in the form of the original's."""
    shape = {k: v for k, v in asdict(c).items() if k != "rope_theta"}
    sparse = c.num_hidden_layers - c.first_k_dense_replace
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        **shape,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": eos_ids,
        "ep_size": 1,
        "head_dim": c.qk_nope_head_dim,
        "hidden_act": "silu",
        "index_share_for_mtp_iteration": True,
        "index_topk_pattern": None,
        "indexer_rope_interleave": True,
        "initializer_range": 0.02,
        "mlp_layer_types": ["dense"] * c.first_k_dense_replace + ["sparse"] * sparse,
        "moe_layer_freq": 1,
        "moe_router_dtype": "float32",
        "n_group": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": c.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": eos_ids[0],
        "pretraining_tp": 1,
        "qk_head_dim": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        **extra,
    }
