"""transformers' `Glm5Next*` computed in float64 throughout, for parity.

The reference casts its control paths to float32 by name, with `.float()`, `.to(torch.float32)` and
`torch.float32`. So while it runs here those casts mean float64: 6e-6 to 2e-5 of its own rounding would
otherwise hide behind the tolerance.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.tiny_glm import Array, fuse_experts


def flash_reference(config: dict[str, Any], weights: dict[str, Array]) -> Any:
    """transformers' language model with its head, float64, eager, holding exactly these weights."""
    import torch
    from torch import nn
    from transformers.models.glm5_next import modeling_glm5_next as reference
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    hf_config = Glm5NextTextConfig(**keys)
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = reference.Glm5NextTextModel(hf_config).eval().double()
    first = config["mlp_layer_types"].index("sparse")
    fused = fuse_experts(weights, config | {"first_k_dense_replace": first})
    head = torch.from_numpy(fused.pop("lm_head.weight")).double()
    state = {_reference_name(name): torch.from_numpy(w).double() for name, w in fused.items()}
    for prefix in {n.rpartition("q_conv1d")[0] for n in state if "q_conv1d" in n}:
        parts = [state.pop(f"{prefix}{part}_conv1d.weight") for part in "qkv"]
        state[f"{prefix}conv1d.weight"] = torch.cat(parts)
    model.load_state_dict(state, strict=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.double())
    assert isinstance(model, nn.Module)
    return model, head


def _reference_name(name: str) -> str:
    name = name.removeprefix("model.")
    for gate in ("f_a_proj", "f_b_proj", "dt_bias", "A_log"):
        name = name.replace(f"self_attn.{gate}", f"self_attn.forget_gate.{gate}")
    return name


def flash_reference_logits(made: Any, ids: list[int]) -> Array:
    """Logits [T, V] of one prompt in one forward without a cache, rounded to float32 at the end."""
    import torch

    model, head = made
    with torch.no_grad(), _exact():
        hidden = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        assert hidden.dtype == torch.float64
        return np.asarray((hidden @ head.T).numpy(), dtype=np.float64)


@contextmanager
def _exact() -> Iterator[None]:
    """Lets the reference's casts to float32 keep float64."""
    import torch
    from transformers.models.glm5_next import modeling_glm5_next as reference

    class Exact:
        """The torch module as the reference sees it, with another float32."""

        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with (
        patch.object(reference, "torch", Exact()),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.Tensor, "type", lambda self, kind: self.double()),
    ):
        yield
