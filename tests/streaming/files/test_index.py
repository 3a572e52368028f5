from pathlib import Path

import numpy as np
import pytest

from config.errors import CheckpointError
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from tests.streaming.expert_files import Kinds, Tensors, separate, stacked, write_safetensors

BF16: Kinds = {"weight": ("BF16", (4, 8))}


def make_index(directory: Path, tensors: Tensors, num_layers: int | None = None) -> ExpertIndex:
    write_safetensors(directory / "model.safetensors", tensors)
    return ExpertIndex.from_entries(read_headers(directory), num_layers)


def read_expert(index: ExpertIndex, layer: int, expert: int) -> dict[str, bytes]:
    return {
        piece.part.name: piece.path.read_bytes()[piece.offset :][: piece.part.nbytes]
        for piece in index.pieces(layer, expert)
    }


def test_pieces_of_a_stack_are_the_slices_of_its_experts(tmp_path: Path) -> None:
    tensors = stacked(np.random.default_rng(0), [3, 5], 4)
    index = make_index(tmp_path, tensors)
    assert (index.layers, index.num_experts) == ((3, 5), 4)
    for layer in index.layers:
        for expert in range(4):
            for name, data in read_expert(index, layer, expert).items():
                whole = tensors[f"model.layers.{layer}.mlp.switch_mlp.{name}"][2]
                assert data == whole[expert * len(data) :][: len(data)]


def test_pieces_of_separate_experts_are_their_tensors(tmp_path: Path) -> None:
    tensors = separate(np.random.default_rng(0), [3], 12)
    index = make_index(tmp_path, tensors)
    for expert in range(12):
        for name, data in read_expert(index, 3, expert).items():
            assert data == tensors[f"model.layers.3.mlp.experts.{expert}.{name}"][2]


def test_a_fused_stack_is_cut_into_gate_and_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gate_up, down = rng.bytes(3 * 2 * 4 * 8 * 2), rng.bytes(3 * 8 * 4 * 2)
    index = make_index(
        tmp_path,
        {
            "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (3, 8, 8), gate_up),
            "model.layers.0.mlp.experts.down_proj": ("BF16", (3, 8, 4), down),
        },
    )
    for expert in range(3):
        parts = read_expert(index, 0, expert)
        both = gate_up[expert * 128 :][:128]
        assert parts == {
            "gate_proj.weight": both[:64],
            "up_proj.weight": both[64:],
            "down_proj.weight": down[expert * 64 :][:64],
        }
    assert [part.shape for part in index.parts(0)] == [(4, 8), (4, 8), (8, 4)]


def test_layers_may_differ_in_shape_and_quantisation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    index = make_index(tmp_path, {**stacked(rng, [1], 4), **stacked(rng, [2], 4, BF16)})
    assert index.expert_bytes(1) == 3 * (32 * 6 * 4 + 2 * 32 * 2)
    assert index.expert_bytes(2) == 3 * 4 * 8 * 2


def test_the_mtp_layer_is_left_out_but_still_no_trunk_tensor(tmp_path: Path) -> None:
    index = make_index(tmp_path, separate(np.random.default_rng(0), [3, 4], 2), num_layers=4)
    assert index.layers == (3,)
    assert ExpertIndex.is_expert_tensor("model.layers.4.mlp.experts.1.up_proj.weight")


@pytest.mark.parametrize(
    ("name", "is_expert"),
    [
        ("model.layers.3.mlp.switch_mlp.gate_proj.scales", True),
        ("model.layers.3.mlp.experts.17.down_proj.weight", True),
        ("model.layers.3.mlp.experts.17.down_proj.weight_scale_inv", True),
        ("model.layers.3.mlp.experts.gate_up_proj", True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.0.mlp.gate_proj.weight", False),
    ],
)
def test_expert_tensors_are_told_from_the_trunk_by_name(name: str, is_expert: bool) -> None:
    assert ExpertIndex.is_expert_tensor(name) is is_expert


@pytest.mark.parametrize("number", ["01", "9" * 5000])
def test_numbers_that_stand_for_another_tensor_or_for_nothing_make_no_expert(
    tmp_path: Path, number: str
) -> None:
    tensors = dict(separate(np.random.default_rng(0), [3], 4))
    wanted = tensors["model.layers.3.mlp.experts.1.up_proj.weight"][2]
    name = f"model.layers.3.mlp.experts.{number}.up_proj.weight"
    dtype, shape, data = tensors["model.layers.3.mlp.experts.1.up_proj.weight"]
    index = make_index(tmp_path, tensors | {name: (dtype, shape, bytes(len(data)))})
    assert not ExpertIndex.is_expert_tensor(name)
    assert read_expert(index, 3, 1)["up_proj.weight"] == wanted


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = dict(separate(np.random.default_rng(0), [3], 4))
    del tensors["model.layers.3.mlp.experts.2.up_proj.scales"]
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.scales is missing"):
        make_index(tmp_path, tensors)


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    tensors = dict(stacked(np.random.default_rng(0), [3], 4))
    del tensors["model.layers.3.mlp.switch_mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layer 3: up_proj\.weight"):
        make_index(tmp_path, tensors)


def test_experts_of_unlike_shape_in_one_layer_are_refused(tmp_path: Path) -> None:
    tensors = dict(separate(np.random.default_rng(0), [3], 2, BF16))
    tensors["model.layers.3.mlp.experts.1.up_proj.weight"] = ("BF16", (2, 8), bytes(32))
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight is BF16 \(2, 8\)"):
        make_index(tmp_path, tensors)


def test_fp8_experts_are_sent_to_the_converter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="glmserve convert"):
        make_index(tmp_path, separate(np.random.default_rng(0), [3], 2, {"weight": ("F8_E4M3", (4, 8))}))


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no expert tensors"):
        make_index(tmp_path, {"model.norm.weight": ("BF16", (4,), bytes(8))})
