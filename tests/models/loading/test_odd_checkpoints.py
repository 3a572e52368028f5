"""Checkpoints as people have them: behind a wrapper, with an index that is wrong, or of another engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from config.errors import CheckpointError
from models.args import ModelArgs
from models.convert.convert import convert
from models.convert.recipe import make_recipe
from models.loading.checkpoint_names import is_complete
from models.loading.loading import open_checkpoint
from server.commands.checkpoint import choose_checkpoint, find_checkpoint
from tests.checkpoints import open_model
from tests.models.make_golden import GOLDEN, SEED
from tests.tiny_glm import SCHEDULES, SHARED, Array, fuse_experts, make_weights, save_checkpoint, tokens
from tests.tiny_model import logits

INDEX = "model.safetensors.index.json"
Weights = dict[str, Array]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(SHARED, SEED)


@pytest.fixture(scope="module")
def golden() -> Array:
    return load_file(GOLDEN)["shared.32"]


def assert_serves(directory: Path, golden: Array) -> None:
    assert find_checkpoint(str(directory)) == directory
    assert np.abs(logits(open_model(directory).model, tokens(SHARED, 32)) - golden).max() <= 1e-5


def wrapped(weights: Weights, layers: str, head: str) -> Weights:
    return {
        name.replace("model.", layers, 1) if name.startswith("model.") else name.replace("lm_head.", head): w
        for name, w in weights.items()
    }


TEXT = {name: value for name, value in SHARED.items() if name != "eos_token_id"}


@pytest.mark.parametrize(
    ("layers", "head", "config"),
    [
        ("language_model.model.", "language_model.lm_head.", SHARED),
        ("language_model.model.", "language_model.lm_head.", {"model_type": "glm5v", "text_config": TEXT}),
        ("model.language_model.", "lm_head.", {"model_type": "glm_moe_dsa", "text_config": {
            name: value for name, value in TEXT.items() if name != "model_type"}}),
        ("language_model.", "lm_head.", {"model_type": "x", "llm_config": TEXT}),
        ("", "lm_head.", SHARED),
        ("thinker.text.model.", "thinker.lm_head.", {"language_config": TEXT, "vision_config": {}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_language_model_behind_a_wrapper_is_found_and_its_companions_left_out(
    tmp_path: Path, weights: Weights, golden: Array, layers: str, head: str, config: dict[str, Any]
) -> None:
    others: Weights = {
        "vision_tower.layers.0.embed_tokens.weight": np.zeros((2, 2), np.float32),
        "multi_modal_projector.linear.weight": np.zeros((3,), np.float32),
    }
    assert_serves(
        save_checkpoint(tmp_path, config, wrapped(weights, layers, head) | (others if layers else {})), golden
    )


def test_a_wrapped_checkpoint_converts_to_a_plain_one(tmp_path: Path, weights: Weights) -> None:
    config = {"model_type": "glm5v", "text_config": TEXT}
    source = save_checkpoint(tmp_path / "a", config, wrapped(weights, "model.language_model.", "lm_head."))
    convert(source, tmp_path / "b", make_recipe(8, 32, "affine"))
    assert "model.embed_tokens.weight" in open_checkpoint(tmp_path / "b").trunk


def test_two_language_models_are_refused(tmp_path: Path, weights: Weights) -> None:
    both = weights | wrapped(weights, "language_model.model.", "language_model.lm_head.")
    with pytest.raises(CheckpointError, match="holds 2 language models"):
        open_checkpoint(save_checkpoint(tmp_path, SHARED, both))


def rename_shards(directory: Path) -> None:
    """Other names than the index has, as after a second download of a repository that was split anew."""
    for number, path in enumerate(sorted(directory.glob("model*.safetensors"))):
        path.rename(directory / f"model-{number:05d}-of-00007.safetensors")


def swap_shards(directory: Path) -> None:
    first, second = sorted(directory.glob("model*.safetensors"))
    first.rename(directory / "other")
    second.rename(first)
    (directory / "other").rename(second)


def merge_shards(directory: Path) -> None:
    paths = sorted(directory.glob("model*.safetensors"))
    merged = {name: array for path in paths for name, array in load_file(path).items()}
    for path in paths:
        path.unlink()
    save_file(merged, directory / "model.safetensors")


def change_index(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        (directory / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))

    return apply


def cut_index(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": {"model.norm')


def half(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: shard for name, shard in weight_map.items() if shard.startswith("model-00001")}


def of_mtp(weight_map: dict[str, str]) -> dict[str, str]:
    return weight_map | {"model.layers.11.mlp.gate.weight": "model-00003-of-00003.safetensors"}


def of_another(weight_map: dict[str, str]) -> dict[str, str]:
    return {
        f"model.layers.{n}.mlp.switch_mlp.up_proj.weight": "model-00001-of-00282.safetensors"
        for n in range(9)
    }


def leftover(directory: Path) -> None:
    """Half of another copy beside the shards that the index names."""
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [rename_shards, swap_shards, merge_shards, cut_index, leftover, change_index(half), change_index(of_mtp),
     change_index(of_another), change_index(lambda weight_map: {}),
     change_index(lambda weight_map: weight_map | {"model.norm.bias": "model-00001-of-00002.safetensors"})],
)  # fmt: skip
def test_complete_shards_are_served_whatever_their_index_says(
    tmp_path: Path, weights: Weights, golden: Array, change: Callable[[Path], None]
) -> None:
    change(save_checkpoint(tmp_path, SHARED, weights))
    assert_serves(tmp_path, golden)


@pytest.mark.parametrize(
    "change", [rename_shards, swap_shards, change_index(of_mtp), change_index(of_another)]
)
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.7.mlp.experts.3.up_proj.weight"])
def test_shards_that_lack_a_tensor_are_refused_whatever_their_index_says(
    tmp_path: Path, weights: Weights, change: Callable[[Path], None], lost: str
) -> None:
    save_checkpoint(tmp_path, SHARED, {name: array for name, array in weights.items() if name != lost})
    change(tmp_path)
    with pytest.raises(CheckpointError):
        find_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shared_experts", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_fused", [False, True])
def test_what_is_called_complete_is_what_the_model_needs(
    schedule: str, shared_experts: int, is_fused: bool
) -> None:
    """A name that could be taken away here would be missed only by the engine, after minutes."""
    config = SCHEDULES[schedule]
    args = ModelArgs.from_config(config | {"n_shared_experts": shared_experts})
    weights = make_weights(config, SEED)
    if not args.n_shared_experts:
        weights = {name: array for name, array in weights.items() if "shared_experts" not in name}
    names = set(fuse_experts(weights, config) if is_fused else weights)
    assert is_complete(names, args)
    assert all(not is_complete(names - {name}, args) for name in names)


METHODS: dict[str, dict[str, Any]] = {
    "AWQ": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "compressed-tensors pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "compressed-tensors int-quantized": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "EXL3": {"quant_method": "exl3", "bits": 3.5},
    "ModelOpt NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes INT8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "HQQ": {"quant_method": "hqq"},
    "Quark": {"quant_method": "quark"},
    "torchao": {"quant_method": "torchao"},
    "something-new": {"quant_method": "something-new"},
    "ModelOpt FP8": {"quant_algo": "FP8", "kv_cache_quant_algo": None},
    "bitsandbytes INT4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def refusals(directory: Path) -> list[str]:
    messages = []
    for ask in (open_checkpoint, lambda path: convert(path, path / "new", make_recipe(None, None, "affine"))):
        with pytest.raises(CheckpointError) as caught:
            ask(directory)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("label", METHODS)
def test_other_engines_formats_are_refused_by_name_and_not_sent_to_the_converter(
    tmp_path: Path, weights: Weights, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    directory = tmp_path / "models--org--glm" / "snapshots" / "a"
    save_checkpoint(directory, SHARED | {"quantization_config": METHODS[label]}, weights)
    for message in refusals(directory):
        assert label in message
        assert "convert" not in message
    assert choose_checkpoint(None).directory != directory


@pytest.mark.parametrize("name", ["quantization", "quant_config", "compression_config"])
def test_a_format_is_found_under_each_of_its_headings(tmp_path: Path, weights: Weights, name: str) -> None:
    save_checkpoint(tmp_path, SHARED | {name: {"quant_method": "awq", "bits": 4}}, weights)
    of_loading, of_convert = refusals(tmp_path)
    assert "AWQ" in of_loading
    assert "glmserve convert" not in of_loading + of_convert


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "ModelOpt NVFP4"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "ModelOpt FP8"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "GPTQ INT4"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, "AWQ"),
    ],
)
def test_formats_that_only_a_file_beside_the_config_names_are_refused_too(
    tmp_path: Path, weights: Weights, name: str, content: object, label: str
) -> None:
    save_checkpoint(tmp_path, SHARED, weights)
    (tmp_path / name).write_text(json.dumps(content))
    for message in refusals(tmp_path):
        assert label in message


EXPERT = "model.layers.5.mlp.experts.2.up_proj."


@pytest.mark.parametrize(
    ("replaced", "label"),
    [
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}, "GPTQ"),
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, "AWQ"),
        ({"weight_packed": np.int32, "weight_scale": np.float16}, "compressed-tensors"),
        ({"trellis": np.int16, "suh": np.float16, "svh": np.float16}, "EXL3"),
        ({"weight": np.uint8, "weight_scale": np.uint8, "weight_scale_2": np.float32}, "ModelOpt NVFP4"),
        ({"weight": np.int8}, "INT8"),
        ({"weight": np.int8, "SCB": np.float32}, "bitsandbytes"),
    ],
    ids=str,
)  # fmt: skip
def test_formats_that_no_file_names_are_told_by_their_tensors(
    tmp_path: Path, weights: Weights, replaced: dict[str, Any], label: str
) -> None:
    odd: dict[str, Any] = {name: array for name, array in weights.items() if not name.startswith(EXPERT)}
    odd |= {EXPERT + name: np.zeros((4, 4), dtype) for name, dtype in replaced.items()}
    for message in refusals(save_checkpoint(tmp_path, SHARED, odd)):
        assert label in message
        assert "glmserve convert" not in message


def save_fp8(directory: Path, weights: Weights, change: Callable[[dict[str, mx.array]], object]) -> Path:
    """An FP8 original: experts in one byte with scales for blocks."""
    save_checkpoint(directory, SHARED | {"quantization_config": {"quant_method": "fp8"}}, weights)
    for path in directory.glob("model*.safetensors"):
        path.unlink()
    (directory / INDEX).unlink()
    arrays = {name: mx.array(array) for name, array in weights.items()}
    for name in [name for name in arrays if ".experts." in name]:
        arrays[name] = mx.to_fp8(arrays[name])
        arrays[name + "_scale_inv"] = mx.ones((1, 1))
    change(arrays)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(mark_fp8(raw))
    return directory


def mark_fp8(raw: bytes) -> bytes:
    """MLX writes FP8 as bytes without a name."""
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def test_an_fp8_original_is_sent_to_the_converter_with_its_folder(tmp_path: Path, weights: Weights) -> None:
    directory = save_fp8(tmp_path / "fp8", weights, lambda arrays: None)
    with pytest.raises(CheckpointError, match=f"glmserve convert {directory} DST"):
        open_checkpoint(directory)
    convert(directory, tmp_path / "new", make_recipe(8, 32, "affine"))
    open_checkpoint(tmp_path / "new")


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop(EXPERT + "weight_scale_inv"),
        lambda arrays: arrays.update({EXPERT + "weight_scale_inv": mx.ones((3, 3))}),
        lambda arrays: arrays.update({EXPERT + "weight_scale_inv": mx.ones((1, 1), mx.int32)}),
        lambda arrays: arrays.update({"model.norm.weight": mx.ones((64,), mx.int32)}),
        lambda arrays: arrays.pop("model.layers.4.mlp.experts.7.down_proj.weight"),
    ],
)  # fmt: skip
def test_fp8_that_the_converter_refuses_is_not_sent_there(
    tmp_path: Path, weights: Weights, change: Callable[[dict[str, mx.array]], object]
) -> None:
    for message in refusals(save_fp8(tmp_path, weights, change)):
        assert "glmserve convert" not in message
