"""The router against transformers' GlmMoeDsaTopkRouter."""

import dataclasses
import importlib.util
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.args import ModelArgs
from models.arithmetic import CPU
from models.experts.router import Router, expert_weights, limit_to_groups
from tests.tiny_glm import TINY

needs_reference = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed")
GROUPED = TINY | {"n_routed_experts": 16, "num_experts_per_tok": 4}


def make_router(config: dict[str, Any], seed: int = 0) -> Router:
    rng = np.random.default_rng(seed)
    router = Router(ModelArgs.from_config(config), CPU)
    router.weight = mx.array(rng.standard_normal(router.weight.shape).astype(np.float32) / 8)
    router.e_score_correction_bias = mx.array(0.2 * rng.standard_normal(16).astype(np.float32))
    return router


@pytest.mark.reference
@needs_reference
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (2, 1)])
def test_choice_and_weights_equal_the_reference(n_group: int, topk_group: int) -> None:
    import torch
    from transformers import GlmMoeDsaConfig
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaTopkRouter

    config = GROUPED | {"n_group": n_group, "topk_group": topk_group}
    ours = make_router(config)
    keys = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    theirs = GlmMoeDsaTopkRouter(GlmMoeDsaConfig(**keys))
    theirs.weight.data = torch.from_numpy(np.array(ours.weight))
    theirs.e_score_correction_bias = torch.from_numpy(np.array(ours.e_score_correction_bias))
    x = np.random.default_rng(1).standard_normal((50, TINY["hidden_size"])).astype(np.float32)
    with torch.no_grad():
        _, weights, ids = theirs(torch.from_numpy(x))
    order = ids.argsort(dim=-1)
    got_ids, got_weights, _ = ours(mx.array(x))
    assert np.array_equal(np.array(got_ids), ids.gather(1, order).numpy())
    assert np.abs(np.array(got_weights) - weights.gather(1, order).numpy()).max() < 1e-6


def test_logits_are_float32_under_bfloat16_rows() -> None:
    router = make_router(GROUPED)
    x = mx.random.normal((5, TINY["hidden_size"])).astype(mx.bfloat16)
    _, weights, _ = router(x)
    _, exact, _ = router(x.astype(mx.float32))
    assert weights.dtype == mx.float32
    assert mx.array_equal(weights, exact)


def test_experts_outside_the_best_groups_are_never_chosen_even_below_zero() -> None:
    choice = mx.array([[-5.0, -6.0, -1.0, -2.0]])
    assert limit_to_groups(choice, 2, 1).tolist() == [[-float("inf"), -float("inf"), -1.0, -2.0]]


def test_zero_scores_do_not_divide_by_zero() -> None:
    args = dataclasses.replace(ModelArgs.from_config(GROUPED), routed_scaling_factor=1.0)
    weights = expert_weights(mx.zeros((1, 16)), mx.array([[0, 1, 2, 3]]), args)
    assert weights.tolist() == [[0.0] * 4]
