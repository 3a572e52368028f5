"""The rehearsal's checkpoint: true shapes, values that keep a layer's size, experts that differ."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.rehearsal import checkpoint
from benchmarks.rehearsal.__main__ import as_markdown
from models.loading.public_formats import Packing, write_holes

NUM_EXPERTS = 3


@pytest.mark.parametrize(
    "packing",
    [Packing(3), Packing(2), Packing(4), Packing(4, 32, "mxfp4")],
    ids=lambda one: f"{one.bits}{one.mode}",
)
def test_experts_are_neither_zero_nor_alike(tmp_path: Path, packing: Packing) -> None:
    path, shape = tmp_path / "model-00003.safetensors", (NUM_EXPERTS, 512, 512)
    write_holes(path, list(packing.tensors("up_proj", shape)))
    size = path.stat().st_size
    checkpoint._fill_experts(path, bytes(range(1, 256)) * 1021)
    assert path.stat().st_size == size
    parts = mx.load(str(path))
    assert isinstance(parts, dict)
    dense = mx.dequantize(
        parts["up_proj.weight"], parts["up_proj.scales"], parts.get("up_proj.biases"),
        packing.group_size, packing.bits, packing.mode,
    ).astype(mx.float32)  # fmt: skip
    assert dense.shape == shape
    assert bool(mx.isfinite(dense).all())
    assert bool(mx.abs(dense).max() < 100)
    assert len({mx.abs(one).sum().item() for one in dense} | {0.0}) == NUM_EXPERTS + 1


@pytest.mark.parametrize("packing", [Packing(2), Packing(4), Packing(6), Packing(4, 32, "mxfp4")])
@pytest.mark.parametrize("width", [512, 2048, 6144])
def test_a_packed_matrix_keeps_the_size_of_what_it_multiplies(
    tmp_path: Path, packing: Packing, width: int
) -> None:
    path = tmp_path / "model-trunk.safetensors"
    write_holes(path, list(packing.tensors("o_proj", (256, width))))
    checkpoint._fill_trunk(path, np.random.default_rng(1))
    parts = mx.load(str(path))
    assert isinstance(parts, dict)
    x = mx.random.normal((64, width), key=mx.random.key(0))
    y = mx.quantized_matmul(
        x, parts["o_proj.weight"], parts["o_proj.scales"], parts.get("o_proj.biases"), True,
        packing.group_size, packing.bits, packing.mode,
    )  # fmt: skip
    assert 0.6 < float(mx.sqrt(mx.mean(y.astype(mx.float32) ** 2))) < 1.6


def test_a_report_tells_sizes_and_failures() -> None:
    acts = {
        "start": {"outcome": "passed", "seconds": 1.5, "facts": {"peak": 3_200_000_000, "slots": 240_000}},
        "kill": {"outcome": "failed: AssertionError: 0 found", "seconds": 2, "facts": {}},
    }
    text = as_markdown({"machine": "Linux", "acts": acts})
    assert "peak 3.2 GB; slots 240000" in text
    assert "| kill | failed: AssertionError: 0 found | 2 |" in text
