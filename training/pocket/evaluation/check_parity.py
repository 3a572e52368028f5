"""Proves the torch model equal to transformers' GlmMoeDsaForCausalLM on a small random model, in float32."""

import torch
from torch import Tensor

from training.pocket.network.model import Pocket
from training.pocket.network.settings import Settings, model_config

SMALL = Settings(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    q_lora_rank=64,
    index_topk=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_attention_heads=4,
)


def randomised(model: Pocket) -> Pocket:
    """Moves what starts at one or zero, so that an error there shows."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "bias" in name:
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model


def reference_logits(model: Pocket, ids: Tensor) -> Tensor:
    """The logits of transformers with the same parameters."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    config = GlmMoeDsaConfig(**model_config(model.c, [0]), attn_implementation="eager")
    reference = GlmMoeDsaForCausalLM(config).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    with torch.no_grad():
        logits: Tensor = reference(ids).logits
    return logits


def main() -> None:
    torch.manual_seed(0)
    model = randomised(Pocket(SMALL))
    ids = torch.randint(0, SMALL.vocab_size, (2, 96))
    with torch.no_grad():
        hidden, _ = model.hidden(ids, sparse=True)
        difference = (model.logits(hidden) - reference_logits(model, ids)).abs().max().item()
        dense, _ = model.hidden(ids, sparse=False)
        moved = (model.logits(dense) - model.logits(hidden)).abs().max().item()
    print(f"largest difference of logits {difference:.2e}; dense against sparse {moved:.2f}")
    assert difference < 1e-5 < moved


if __name__ == "__main__":
    main()
