"""Our logits are those of transformers' GlmMoeDsaForCausalLM, and each fault of the known list is noticed.

The golden logits were made by tests/models/make_golden.py; where torch is installed the reference also runs
live, on other weights and other prompts.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.glm_moe_dsa import Model
from tests.grids import few
from tests.models.make_golden import GOLDEN, LENGTHS, SEED, TOPK, reference_logits, reference_model
from tests.models.mutants import MUTANTS, Plant
from tests.tiny_glm import SCHEDULES, SHARED, Array, make_weights, tokens
from tests.tiny_model import logits, make_model

TOLERANCE = 1e-5
needs_reference = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed")


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Model]:
    return {name: make_model(config, make_weights(config, SEED)) for name, config in SCHEDULES.items()}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_shot_logits_equal_the_reference(
    schedule: str, length: int, tiny: dict[str, Model], golden: dict[str, Array]
) -> None:
    ours = logits(tiny[schedule], tokens(SCHEDULES[schedule], length))
    assert np.abs(ours - golden[f"{schedule}.{length}"]).max() <= TOLERANCE


@pytest.mark.parametrize("chunk", few([1, 3, TOPK, TOPK + 1], [3, TOPK + 1]))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chunked_logits_equal_the_reference(
    schedule: str, chunk: int, tiny: dict[str, Model], golden: dict[str, Array]
) -> None:
    length = LENGTHS[-1]
    ours = logits(tiny[schedule], tokens(SCHEDULES[schedule], length), chunk)
    assert np.abs(ours - golden[f"{schedule}.{length}"]).max() <= TOLERANCE


@pytest.mark.reference
@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_the_live_reference_on_fresh_weights(schedule: str) -> None:
    config, seed = SCHEDULES[schedule], 11
    weights = make_weights(config, seed)
    reference = reference_model(config, weights)
    model = make_model(config, weights)
    for length in LENGTHS:
        ids = tokens(config, length, seed=seed)
        assert np.abs(logits(model, ids) - reference_logits(reference, ids)).max() <= TOLERANCE


def test_up_to_topk_tokens_attention_is_dense_and_beyond_it_is_not(tiny: dict[str, Model]) -> None:
    dense = make_model(SHARED | {"index_topk": 10_000}, make_weights(SHARED, SEED))
    ids = tokens(SHARED, 4 * TOPK)
    sparse_logits, dense_logits = logits(tiny["shared"], ids), logits(dense, ids)
    assert np.abs(sparse_logits[:TOPK] - dense_logits[:TOPK]).max() <= TOLERANCE
    assert np.abs(sparse_logits[TOPK:] - dense_logits[TOPK:]).max() > 1e-2


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_parity_notices_the_mutant(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, golden: dict[str, Array]
) -> None:
    plant(monkeypatch)
    length = LENGTHS[-1]
    mutant = make_model(SHARED, make_weights(SHARED, SEED))
    error = np.abs(logits(mutant, tokens(SHARED, length)) - golden[f"shared.{length}"]).max()
    assert error > 1000 * TOLERANCE, f"{plant.__name__} changes the logits by {error:.1e} only"


def test_the_golden_file_is_small_enough_to_live_in_the_repository() -> None:
    assert Path(GOLDEN).stat().st_size < 200_000
