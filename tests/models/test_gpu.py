"""The same checks where MLX computes on a GPU. CI has none: they skip there, and say so.

Bounds are wider than on the CPU where kernels differ by shape; run with MLX_ENABLE_TF32=0, or float32
products on NVIDIA are rounded to 10 bits.
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arithmetic import GPU, Arithmetic, Quantization
from server.checkpoint import POCKET
from server.glm.template import load_chat_template
from server.glm.tokenizer import load_tokenizer
from tests.checkpoints import greedy, open_model, save_packed
from tests.models.make_golden import GOLDEN, LENGTHS, SEED
from tests.tiny_glm import SCHEDULES, WIDER, make_weights, save_checkpoint, tokens
from tests.tiny_model import logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (mx.cuda.is_available() or mx.metal.is_available()), reason="MLX computes on the CPU here"
    ),
]
FLOAT32 = Arithmetic("gpu float32", mx.float32, max_packed_rows=None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_the_reference_in_float32(schedule: str, tmp_path: Path) -> None:
    assert os.environ.get("MLX_ENABLE_TF32") == "0", "run with MLX_ENABLE_TF32=0"
    config, length = SCHEDULES[schedule], LENGTHS[-1]
    model = open_model(
        save_checkpoint(tmp_path, config, make_weights(config, SEED)), arithmetic=FLOAT32
    ).model
    golden = load_file(GOLDEN)[f"{schedule}.{length}"]
    for chunk in (1, 3, 9, length):
        error = np.abs(logits(model, tokens(config, length), chunk) - golden).max()
        print(f"{schedule}, chunks of {chunk}: {error:.1e}")
        assert error <= 1e-5


@pytest.mark.parametrize("slots", [4, 5, 11])
def test_streamed_equals_resident_bit_for_bit_in_decode(slots: int, tmp_path: Path) -> None:
    def packing(path: str) -> Quantization | None:
        return Quantization(64, 3) if "switch_mlp" in path else None

    folder = save_packed(tmp_path, WIDER, make_weights(WIDER, SEED), packing)
    resident, streamed = open_model(folder, None, GPU), open_model(folder, slots, GPU)
    prompt = tokens(WIDER, 12)
    text, rows = greedy(streamed.model, prompt, 25)
    expected_text, expected_rows = greedy(resident.model, prompt, 25)
    streamed.store.check_integrity()
    assert streamed.store.statistics().evictions > 0
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)


def test_pocket_adds_in_bfloat16() -> None:
    tokenizer, template = load_tokenizer(POCKET), load_chat_template(POCKET)
    prompt = template.render([{"role": "user", "content": "What is 17+25?"}], None, {})
    text, _ = greedy(open_model(POCKET, None, GPU).model, list(tokenizer.encode(prompt)), 61)
    assert "17 + 25 = 42." in tokenizer.decode(text)
