"""The same checks where MLX computes on a GPU. CI has none: they skip there, and say so.

Bounds are wider than on the CPU where kernels differ by shape; run with MLX_ENABLE_TF32=0, or float32
products on NVIDIA are rounded to 10 bits.
"""

import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arithmetic import CPU, Quantization, choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.attention.selection import causal_mask, select, selected_positions
from models.cuda import choices, products
from models.glm_moe_dsa import Model
from server.commands.checkpoint import POCKET
from server.glm.templates.template import load_chat_template
from server.glm.tokenizer import load_tokenizer
from streaming.device_copy import HostRows, fill_slots
from tests.checkpoints import greedy, open_model, save_packed
from tests.models.make_golden import GOLDEN, LENGTHS, SEED
from tests.tiny_glm import SCHEDULES, SHARED, WIDER, make_weights, save_checkpoint, tokens
from tests.tiny_model import distance, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (mx.cuda.is_available() or mx.metal.is_available()), reason="MLX computes on the CPU here"
    ),
]
GPU = choose_arithmetic()
FLOAT32 = replace(GPU, dtype=mx.float32)
# GLM's own rotated width: MLX 0.32's CUDA kernel cannot be launched for many rows of the tiny width.
WIDE_ROPE = {"qk_rope_head_dim": 64, "index_head_dim": 64}


@pytest.fixture(autouse=True)
def exact_products() -> None:
    assert os.environ.get("MLX_ENABLE_TF32") == "0", "run with MLX_ENABLE_TF32=0"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_the_reference_in_float32(schedule: str, tmp_path: Path) -> None:
    config, length = SCHEDULES[schedule], LENGTHS[-1]
    model = open_model(
        save_checkpoint(tmp_path, config, make_weights(config, SEED)), arithmetic=FLOAT32
    ).model
    golden = load_file(GOLDEN)[f"{schedule}.{length}"]
    for chunk in (1, 3, 9):
        error = np.abs(logits(model, tokens(config, length), chunk) - golden).max()
        print(f"{schedule}, chunks of {chunk}: {error:.1e}")
        assert error <= 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_long_prompts_give_the_logits_of_the_cpu_in_float32(schedule: str, tmp_path: Path) -> None:
    config = SCHEDULES[schedule] | WIDE_ROPE
    ids = tokens(config, 300)
    folder = save_checkpoint(tmp_path, config, make_weights(config, SEED))
    with mx.stream(mx.cpu):
        expected = logits(open_model(folder, arithmetic=CPU).model, ids, len(ids))
    model = open_model(folder, arithmetic=FLOAT32).model
    for chunk in (40, len(ids)):
        error = np.abs(logits(model, ids, chunk) - expected).max()
        print(f"{schedule}, chunks of {chunk}: {error:.1e}")
        assert error <= 1e-5


def packed(path: str) -> Quantization | None:
    return Quantization(64, 3) if "switch_mlp" in path else None


@pytest.mark.parametrize("slots", [4, 5, 11])
@pytest.mark.parametrize("num_tokens", [1, 4, 12, 40])
def test_streamed_equals_resident_bit_for_bit(slots: int, num_tokens: int, tmp_path: Path) -> None:
    config = WIDER | WIDE_ROPE
    folder = save_packed(tmp_path, config, make_weights(config, SEED), packed)
    resident, streamed = open_model(folder, None, GPU), open_model(folder, slots, GPU)
    prompt = tokens(config, num_tokens)
    text, rows = greedy(streamed.model, prompt, 25)
    expected_text, expected_rows = greedy(resident.model, prompt, 25)
    streamed.store.check_integrity()
    assert streamed.store.statistics().evictions > 0
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)


def test_a_batch_gives_each_the_logits_that_it_gets_alone_in_float32(tmp_path: Path) -> None:
    config = WIDER | WIDE_ROPE
    folder = save_packed(tmp_path, config, make_weights(config, SEED), packed)
    model = open_model(folder, None, FLOAT32).model
    prompts = [tokens(config, length) for length in (5, 9, 17, 30)]

    def read(ids: list[int]) -> Span:
        cache = model.make_cache()
        mx.eval(model(mx.array(ids[:-1]), [Span(cache, 0, len(ids) - 1)]))
        return Span(cache, 0, 1)

    alone = [model.logits(model(mx.array(ids[-1:]), [read(ids)]))[0] for ids in prompts]
    spans = [Span(read(ids).cache, row, row + 1) for row, ids in enumerate(prompts)]
    together = model.logits(model(mx.array([ids[-1] for ids in prompts]), spans))
    assert mx.abs(together - mx.stack(alone)).max() <= 1e-5


MODES = {"affine": (64, 4), "mxfp4": (32, 4)}


def pack(shape: tuple[int, ...], mode: str) -> tuple[list[mx.array], mx.array]:
    """Random weights as packed, and what they stand for, float32."""
    group_size, bits = MODES[mode]
    parts = list(mx.quantize(mx.random.normal(shape).astype(mx.bfloat16), group_size, bits, mode))
    biases = parts[2] if len(parts) == 3 else None
    return parts, mx.dequantize(parts[0], parts[1], biases, group_size, bits, mode, dtype=mx.float32)


@pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("matrices", "rows", "outputs", "inputs"), [(4, 5, 512, 192), (1, 19, 64, 512)])
def test_products_of_our_own_are_near_and_each_row_is_its_own(
    mode: str, matrices: int, rows: int, outputs: int, inputs: int
) -> None:
    parts, values = pack((matrices, outputs, inputs), mode)
    x = mx.random.normal((matrices, rows, inputs)).astype(mx.bfloat16)
    y = products.multiply(x, [parts], MODES[mode][0])
    assert distance(y, x.astype(mx.float32) @ values.swapaxes(-1, -2)) < 5e-3
    alone = [products.multiply(x[:, i : i + 1], [parts], MODES[mode][0]) for i in range(rows)]
    assert mx.array_equal(mx.concatenate(alone, axis=1), y)
    order = mx.array(list(range(matrices))[::-1])
    pairs = products.multiply(x[0, :1], [parts], MODES[mode][0], slots=order[None])
    wanted = x[0, :1].astype(mx.float32) @ values[order].swapaxes(-1, -2)  # MLX cannot multiply reversed ones
    assert distance(pairs[0], wanted[:, 0]) < 5e-3


@pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA")
@pytest.mark.parametrize(
    ("rows", "keys", "k"), [(1, 5000, 2048), (3, 4097, 2048), (4, 30, 32), (1, 3000, 64)]
)
def test_chosen_keys_are_the_best_and_ties_go_to_the_lower(rows: int, keys: int, k: int) -> None:
    scores = mx.round(mx.random.normal((rows, keys)) * 2)
    chosen = choices.best_positions(scores, k)
    visible = causal_mask(keys - rows, rows, keys)
    expected = selected_positions(select(scores, visible, k) if keys > k else visible, k)
    assert mx.array_equal(chosen, expected)
    wider, last = mx.pad(scores, [(0, 0), (0, 60)]), mx.arange(keys - rows, keys)
    expected = mx.where(expected == keys, keys + 60, expected)
    assert mx.array_equal(choices.best_positions(wider, k, last), expected)
    if keys > k:
        assert mx.array_equal(choices.best_mask(scores, k), select(scores, visible, k))


# The widths of GLM's attention, with fewer heads; everything packed.
WIDE = {
    "num_hidden_layers": 5, "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 16,
    "num_attention_heads": 24, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 64,
}  # fmt: skip


@pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA")
@pytest.mark.parametrize("length", [1, 3, 64, 65, 100, 700])
def test_attention_in_few_kernels_is_that_of_mlx(length: int, tmp_path: Path) -> None:
    config = SHARED | WIDE
    folder = save_packed(tmp_path, config, make_weights(config, SEED), lambda path: Quantization(64, 4))
    plain = open_model(folder, None, replace(GPU, has_kernels=False)).model
    exact = open_model(folder, None, replace(GPU, dtype=mx.float32, has_kernels=False)).model
    model = open_model(folder, None, GPU).model
    assert model.model.layers[0].self_attn._fused is not None
    ids = tokens(config, length + 5)

    def steps(model: Model, at_once: int) -> mx.array:
        cache, rows = model.make_cache(), []
        for start in [0, *range(length, len(ids), at_once)]:
            part = ids[start : length if start == 0 else start + at_once]
            hidden = model(mx.array(part), [Span(cache, 0, len(part))])
            rows.append(model.logits(hidden[-1:] if start == 0 else hidden))
        return mx.concatenate(rows)

    expected = steps(exact, 1)
    ours, theirs = distance(steps(model, 1), expected), distance(steps(plain, 1), expected)
    print(f"{length}: {ours:.1e}, without kernels {theirs:.1e}")
    assert ours <= 1.5 * theirs + 5e-3
    assert mx.array_equal(steps(model, 5), steps(model, 1))


@pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA")
def test_a_row_attends_alone_as_in_company(tmp_path: Path) -> None:
    config = SHARED | WIDE
    folder = save_packed(tmp_path, config, make_weights(config, SEED), lambda path: Quantization(64, 4))
    model = open_model(folder, None, GPU).model

    def caches() -> list[SequenceCache]:
        found = []
        for length in (5, 64, 90, 400):
            found.append(model.make_cache())
            mx.eval(model(mx.array(tokens(config, length)), [Span(found[-1], 0, length)]))
        return found

    alone = [model.logits(model(mx.array([7]), [Span(cache, 0, 1)])) for cache in caches()]
    spans = [Span(cache, row, row + 1) for row, cache in enumerate(caches())]
    assert mx.array_equal(model.logits(model(mx.array([7] * 4), spans)), mx.concatenate(alone))


@pytest.mark.skipif(not GPU.has_kernels, reason="kernels are for CUDA")
def test_sums_of_our_own_are_those_of_mlx() -> None:
    plain, rows, k = replace(GPU, has_kernels=False), 7, 3
    ids = mx.sort(mx.random.randint(0, 5, (rows, k)), axis=-1).astype(mx.int32)
    weights, out = mx.random.uniform(shape=(rows, k)), mx.random.normal((rows, 320))
    y, bases = mx.random.normal((35, 320)).astype(mx.bfloat16), mx.array([0, -1, 7, 14, -1], mx.int32)
    ranks = mx.random.randint(0, 7, (rows, k)).astype(mx.int32)
    ours, theirs = (a.add_experts(out, y, weights, ids, ranks, bases) for a in (GPU, plain))
    assert mx.allclose(ours, theirs, atol=1e-5)


@pytest.mark.skipif(not GPU.has_kernels, reason="rows are pinned for CUDA")
def test_pinned_rows_fill_their_slots_bit_for_bit() -> None:
    rng, dtypes = np.random.default_rng(0), (np.uint8, np.uint16, np.uint32, np.float16, np.float32)
    shapes = ((16,), (37, 24), (3, 32), (8,), (5, 7, 4))
    rows = [HostRows(3, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    wanted = [np.zeros((6, *one.array.shape[1:]), one.array.dtype) for one in rows]
    banks = [mx.array(zeros) for zeros in wanted]
    mx.eval(banks)
    assert all(one.is_pinned for one in rows)
    for row_of in ({5: 0, 2: 1}, {2: 2}, {0: 1, 1: 0, 4: 2}):
        for one, copy in zip(rows, wanted, strict=True):
            one.array[...] = rng.integers(0, 200, one.array.shape)
            for slot, row in row_of.items():
                copy[slot] = one.array[row]
        fill_slots(banks, rows, row_of)
        for bank, copy in zip(banks, wanted, strict=True):
            assert np.array_equal(np.array(bank), copy)


def test_pocket_adds_in_bfloat16() -> None:
    tokenizer, template = load_tokenizer(POCKET), load_chat_template(POCKET)
    prompt = template.render([{"role": "user", "content": "What is 17+25?"}], None, {})
    text, _ = greedy(open_model(POCKET, None, GPU).model, list(tokenizer.encode(prompt)), 61)
    assert "17 + 25 = 42." in tokenizer.decode(text)
