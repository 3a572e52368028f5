"""Makes tests/models/golden.safetensors: logits of transformers' GlmMoeDsaForCausalLM on tiny models.

Run once, with torch 2.13.0 and transformers 5.24.0 (`make install EXTRAS=dev,reference`):

    python -m tests.models.make_golden
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.tiny_glm import SCHEDULES, Array, fuse_experts, make_weights, tokens

GOLDEN = Path(__file__).parent / "golden.safetensors"
SEED = 3
TOPK = 8
LENGTHS = (TOPK - 1, TOPK, TOPK + 1, 4 * TOPK, 16 * TOPK)


def reference_model(config: dict[str, Any], weights: dict[str, Array]) -> Any:
    """transformers' model, float32, eager, holding exactly these weights."""
    import torch
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    hf_config = GlmMoeDsaConfig(**keys, attn_implementation="eager", experts_implementation="eager")
    model = GlmMoeDsaForCausalLM(hf_config).eval().float()
    state = {name: torch.from_numpy(w) for name, w in fuse_experts(weights, config).items()}
    model.load_state_dict(state, strict=True)
    return model


def reference_logits(model: Any, ids: list[int]) -> Array:
    """Logits [T, V] of one prompt in one forward without a cache."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False).logits[0]
    return np.asarray(out.numpy(), dtype=np.float32)


def main() -> None:
    golden = {}
    for name, config in SCHEDULES.items():
        model = reference_model(config, make_weights(config, SEED))
        for length in LENGTHS:
            golden[f"{name}.{length}"] = reference_logits(model, tokens(config, length))
    save_file(golden, GOLDEN)


if __name__ == "__main__":
    main()
