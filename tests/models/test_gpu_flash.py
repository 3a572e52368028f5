"""GLM-5.3-Flash's own kernels where MLX computes on NVIDIA. CI has none: they skip there, and say so."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.arithmetic import CPU, Quantization, choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.cuda import products
from models.glm5_next.delta_attention import DeltaAttention
from models.glm5_next.delta_rule import by_chunks
from models.glm_moe_dsa import Model
from tests.checkpoints import greedy, open_model, save_packed
from tests.models.families.tiny_flash import DSA, FLASH, FLASH_SCHEDULES, KDA, make_flash_weights
from tests.tiny_glm import save_checkpoint, tokens
from tests.tiny_model import distance, logits

GPU = choose_arithmetic()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA"),
]
# Wide enough for every kernel; everything packed but what decides.
WIDE_FLASH = FLASH | {
    "num_hidden_layers": 4, "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    "layer_types": [KDA, KDA, DSA, KDA], "indexer_types": ["full"] * 4, "hidden_size": 256,
    "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "linear_head_dim": 128, "linear_num_heads": 16,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "v_head_dim": 64, "index_head_dim": 64,
}  # fmt: skip


def packed(path: str) -> Quantization | None:
    return None if "conv1d" in path else Quantization(64, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(
        tmp_path_factory.mktemp("flash"), WIDE_FLASH, make_flash_weights(WIDE_FLASH, 3), packed
    )


def read(model: Model, ids: list[int]) -> SequenceCache:
    """A cache that holds these tokens."""
    cache = model.make_cache()
    mx.eval(model(mx.array(ids), [Span(cache, 0, len(ids))]))
    return cache


@pytest.mark.parametrize("schedule", FLASH_SCHEDULES)
def test_logits_in_float32_are_those_of_the_cpu(schedule: str, tmp_path: Path) -> None:
    """MLX's own operations only: what differs here is not a kernel of ours."""
    config, length = FLASH_SCHEDULES[schedule], 70
    folder = save_checkpoint(tmp_path, config, make_flash_weights(config, 3))
    with mx.stream(mx.cpu):
        expected = logits(open_model(folder, arithmetic=CPU).model, tokens(config, length), length)
    model = open_model(folder, arithmetic=replace(GPU, dtype=mx.float32, has_kernels=False)).model
    for chunk in (1, 30, length):
        error = np.abs(logits(model, tokens(config, length), chunk) - expected).max()
        print(f"{schedule}, chunks of {chunk}: {error:.1e}")
        assert error <= 1e-4


def test_rows_by_chunks_read_what_they_read_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((70, 4, 128)).astype(np.float32) / 11) for _ in range(3))
    gate = mx.array(-5 * rng.random((70, 4, 128)).astype(np.float32))
    beta = mx.array(rng.random((70, 4)).astype(np.float32))
    state = mx.array(rng.standard_normal((4, 128, 128)).astype(np.float32))
    with mx.stream(mx.cpu):
        expected = [np.array(array) for array in by_chunks(state, q, k, v, gate, beta, 7)]
    for array, one in zip(by_chunks(state, q, k, v, gate, beta, 7), expected, strict=True):
        assert np.abs(np.array(array) - one).max() <= 1e-4


def test_steps_in_few_kernels_are_those_of_mlx(folder: Path) -> None:
    """Steps behind a prompt of 30: as far from float32 as MLX's own operations in bfloat16 are."""
    ids = tokens(WIDE_FLASH, 42)

    def steps(model: Model) -> mx.array:
        cache = read(model, ids[:30])
        rows = [model.logits(model(mx.array([token]), [Span(cache, 0, 1)])) for token in ids[30:]]
        cache.check_integrity()
        return mx.concatenate(rows)

    model = open_model(folder, None, GPU).model
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, DeltaAttention)
    plain = open_model(folder, None, replace(GPU, has_kernels=False)).model
    exact = open_model(folder, None, replace(GPU, has_kernels=False, dtype=mx.float32)).model
    expected = steps(exact)
    ours, theirs = (distance(steps(one), expected) for one in (model, plain))
    print(f"{ours:.1e}, without kernels {theirs:.1e}")
    assert ours <= 1.5 * theirs + 5e-3


def test_a_sequence_steps_alone_as_in_company(folder: Path) -> None:
    model, lengths = open_model(folder, None, GPU).model, (5, 30, 33)

    def caches() -> list[SequenceCache]:
        return [read(model, tokens(WIDE_FLASH, length)) for length in lengths]

    alone, together = caches(), caches()
    for token in (7, 8, 9):
        rows = [model.logits(model(mx.array([token]), [Span(cache, 0, 1)])) for cache in alone]
        spans = [Span(cache, row, row + 1) for row, cache in enumerate(together)]
        assert mx.array_equal(model.logits(model(mx.array([token] * 3), spans)), mx.concatenate(rows))


@pytest.mark.parametrize("slots", [4, 9])
def test_streamed_equals_resident_bit_for_bit(slots: int, folder: Path) -> None:
    prompt = tokens(WIDE_FLASH, 12)
    streamed = open_model(folder, slots, GPU)
    text, rows = greedy(streamed.model, prompt, 25)
    expected_text, expected_rows = greedy(open_model(folder, None, GPU).model, prompt, 25)
    assert streamed.store.statistics().evictions > 0
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_gated_products_are_bounded_in_their_kernel(limit: float) -> None:
    def parts(outputs: int) -> list[mx.array]:
        return list(mx.quantize(mx.random.normal((outputs, 128)).astype(mx.bfloat16), 64, 4))

    gate, up = parts(64), parts(64)
    x = mx.random.normal((3, 128)).astype(mx.bfloat16)
    ours = products.multiply(x, [gate, up], 64, limit=limit)
    values = [
        x.astype(mx.float32) @ mx.dequantize(w, scales, biases, 64, 4, dtype=mx.float32).T
        for w, scales, biases in (gate, up)
    ]
    theirs = replace(GPU, swiglu_limit=limit).gated(*(one.astype(mx.bfloat16) for one in values))
    assert distance(ours, theirs.astype(mx.float32)) < 2e-2
    bad = x.astype(mx.float32) * mx.array([1.0, float("nan"), 1.0])[:, None]
    lost = products.multiply(bad.astype(mx.bfloat16), [gate, up], 64, limit=limit)
    assert mx.isnan(lost[1]).all(), "what is no number stays none"
