"""Checkpoints of GLM-5.3-Flash in every layout in which they are published, and configs that are refused."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import CheckpointError
from config.plan import MAX_RUNNING, make_plan
from models.arithmetic import CPU, METAL
from models.convert.convert import convert
from models.convert.recipe import make_recipe
from models.families import parse_args
from models.glm5_next.flash_args import FlashArgs
from models.loading.loading import make_geometry, open_checkpoint
from models.loading.public_formats import find_format, write_hollow
from server.engine import backend
from server.link.messages import EngineConfig
from tests.checkpoints import open_model
from tests.models.families.tiny_flash import DSA, FLASH, KDA, make_flash_weights
from tests.tiny_glm import Array, fuse_experts, save_checkpoint, tokens
from tests.tiny_model import logits, make_model

WEIGHTS = make_flash_weights(FLASH, 3)
OUTER = {"model_type": "glm5_next", "text_config": FLASH, "vision_config": {"depth": 1}, "image_token_id": 9}


def old_names(weights: dict[str, Array]) -> dict[str, Array]:
    """As the original has them: behind `model.language_model.`, with a vision tower and an MTP layer."""
    out = {}
    for name, tensor in weights.items():
        for kind in ("attn", "ffn"):
            for part in ("fn", "base", "scale"):
                name = name.replace(f".{kind}_hc.{part}", f".hc_{kind}_{part}")
        out[name.replace("model.", "model.language_model.", 1)] = tensor
    noise = np.ones((4, 4), np.float32)
    return out | {
        "model.visual.blocks.0.attn.qkv.weight": noise,
        "model.visual.patch_embed.proj.weight": noise,
        "model.language_model.layers.5.eh_proj.weight": noise,
        "model.language_model.layers.5.self_attn.q_proj.weight": noise,
    }


def mlx_vlm_names(weights: dict[str, Array]) -> dict[str, Array]:
    """As mlx-vlm writes them: matrices one under the other, convolutions with the channel last."""
    joined = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "fbg_a_proj": ("f_a_proj", "b_proj", "g_a_proj"),
        "qkv_conv.conv": ("q_conv1d", "k_conv1d", "v_conv1d"),
        "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    left = {name: w.swapaxes(1, 2) if "conv1d" in name else w for name, w in weights.items()}
    for name in list(left):
        for module, parts in joined.items():
            if name.endswith(f".{parts[0]}.weight") and ".experts." not in name:
                room = name.removesuffix(f"{parts[0]}.weight")
                rows = [left.pop(f"{room}{part}.weight") for part in parts]
                left[f"{room}{module}.weight"] = np.concatenate(rows)
    out = {f"language_model.{name}": np.ascontiguousarray(tensor) for name, tensor in left.items()}
    return out | {"vision_tower.blocks.0.norm1.weight": np.ones(4, np.float32)}


def in_memory_names(weights: dict[str, Array]) -> dict[str, Array]:
    """As transformers names them in memory: gates in a module, one convolution, experts fused."""
    out = fuse_experts(weights, FLASH | {"first_k_dense_replace": 1})
    for prefix in [name.removesuffix("q_conv1d.weight") for name in out if name.endswith("q_conv1d.weight")]:
        out[f"{prefix}conv1d.weight"] = np.concatenate([out.pop(f"{prefix}{p}_conv1d.weight") for p in "qkv"])
        for gate in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"):
            out[f"{prefix}forget_gate.{gate}"] = out.pop(prefix + gate)
    return out


@pytest.mark.parametrize("rename", [old_names, mlx_vlm_names, dict])
def test_every_layout_is_the_same_model(rename: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, OUTER, rename(WEIGHTS))
    opened, ids = open_model(folder), tokens(FLASH, 30)
    expected = logits(make_model(FLASH, WEIGHTS), ids)
    assert np.array_equal(logits(opened.model, ids), expected)


def test_names_that_transformers_has_in_memory_are_converted_too(tmp_path: Path) -> None:
    from models.loading.checkpoint_names import is_complete, plain_names

    args = parse_args(FLASH)
    names = plain_names(in_memory_names(WEIGHTS), args)
    assert is_complete(names, args)
    assert "model.layers.0.self_attn.f_a_proj.weight" in names


@pytest.mark.slow
def test_a_converted_original_is_served_streamed_and_resident(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", OUTER, old_names(WEIGHTS))
    convert(source, tmp_path / "made", make_recipe(8, 32, "affine"))
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert config["model_type"] == "glm5_next_text"
    resident, streamed = open_model(tmp_path / "made"), open_model(tmp_path / "made", 3)
    ids = tokens(FLASH, 40)
    rows = logits(resident.model, ids)
    assert np.array_equal(logits(streamed.model, ids), rows)
    assert np.abs(rows - logits(make_model(FLASH, WEIGHTS), ids)).mean() < 0.05
    streamed.store.close()


def test_what_computes_in_float32_is_held_so(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, OUTER, old_names(WEIGHTS))
    from models.families import family_of
    from models.loading.building import held_dtype

    checkpoint = open_checkpoint(folder)
    exact = family_of(checkpoint.args).load().float32
    held = {
        name.rpartition("layers.0.")[2]
        for name in checkpoint.trunk
        if held_dtype(name, mx.bfloat16, _bfloat16(), exact) == mx.float32
    }
    for name in (
        "attn_hc.fn",
        "ffn_hc.scale",
        "self_attn.A_log",
        "self_attn.dt_bias",
        "self_attn.q_conv1d.weight",
    ):
        assert name in held
    assert "self_attn.q_proj.weight" not in held


def _bfloat16() -> Any:
    from dataclasses import replace

    return replace(CPU, dtype=mx.bfloat16)


def test_states_are_in_the_plan(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, OUTER, old_names(WEIGHTS))
    geometry = make_geometry(open_checkpoint(folder), CPU)
    cache = make_model(FLASH, WEIGHTS).make_cache()
    empty = cache.nbytes
    assert geometry.state_bytes >= empty
    assert geometry.state_bytes - empty <= 3 * 2 * 16 * 4  # a pool's raw keys
    assert geometry.kv_bytes_per_token == 32 * 4
    assert geometry.index_key_bytes_per_token == 16


REFUSED = {
    "qk_rope_head_dim": 64,
    "index_kpool": 3,
    "index_kpool_always_select_tail": False,
    "linear_lower_bound": -6.0,
    "layer_types": [KDA] * 4 + ["sliding"],
    "index_topk": 10,
    "tie_word_embeddings": True,
    "scoring_func": "softmax",
    "swiglu_limit": 0,
    "hc_mult": "four",
    "linear_attn_config": {"safe_gate": False},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=name if name != "linear_attn_config" else "safe_gate"):
        parse_args(FLASH | {name: REFUSED[name]})


@pytest.mark.parametrize(
    ("kinds", "indexers"),
    [
        ([KDA, DSA, KDA, DSA, KDA], ["full", "full", "full", "shared", "full"]),
        ([DSA, DSA, DSA, KDA, KDA], ["full", "shared", "shared", "full", "full"]),
        ([DSA, KDA, KDA, KDA, KDA], ["shared", "full", "full", "full", "full"]),
    ],
)
def test_a_shared_indexer_without_a_full_one_before_it_is_refused(
    kinds: list[str], indexers: list[str]
) -> None:
    with pytest.raises(CheckpointError, match="'shared' indexer behind"):
        parse_args(FLASH | {"layer_types": kinds, "indexer_types": indexers})


def test_the_public_schedule_is_three_linear_layers_to_a_sparse_one() -> None:
    config = {k: v for k, v in FLASH.items() if k not in ("layer_types", "indexer_types")}
    config |= {"num_hidden_layers": 45, "mlp_layer_types": ["dense"] + ["sparse"] * 44}
    args = parse_args(config)
    assert isinstance(args, FlashArgs)
    assert (len(args.linear_layers), len(args.full_layers), args.moe_layers.start) == (34, 11, 1)


def test_the_true_shapes_as_holes_open_and_are_planned(tmp_path: Path) -> None:
    one = find_format("z-ai/glm-5.3-flash")
    assert one is not None
    geometry = make_geometry(open_checkpoint(write_hollow(tmp_path, one)), METAL, 32_768)
    assert geometry.state_bytes // 10**6 == 147  # 34 layers' states and convolutions
    assert geometry.kv_bytes_per_token == 11 * 512 * 2
    assert geometry.sweep_row_bytes * 32_768 > 4 * 4096 * 2 * 32_768  # four streams a row
    plan = make_plan(geometry, 100 * 10**9, 32_768, physical_bytes=128 * 10**9)
    assert plan.lines["states"] >= 4 * geometry.state_bytes * plan.max_running
    assert min(plan.slots_per_layer) > 100


def test_a_plain_model_has_no_line_of_states(tmp_path: Path) -> None:
    one = find_format("z-ai/glm-5.2")
    assert one is not None
    geometry = make_geometry(open_checkpoint(write_hollow(tmp_path, one)), METAL, 32_768)
    plan = make_plan(geometry, 100 * 10**9, 32_768, physical_bytes=128 * 10**9)
    assert "states" not in plan.lines
    assert plan.max_running == MAX_RUNNING


@pytest.mark.parametrize(("name", "is_warned"), [("cpu", False), ("cuda", True)])
def test_where_an_architecture_fails_its_tests_the_log_warns(
    name: str,
    is_warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_checkpoint(tmp_path, FLASH, WEIGHTS)
    monkeypatch.setattr(backend, "choose_arithmetic", partial(replace, CPU, name=name))
    config = EngineConfig(tmp_path, True, 10**9, 64, "error", prefix_memory_bytes=0)
    backend.open_backend(config, lambda *words: None)
    assert ("fails its tests" in caplog.text) == is_warned
