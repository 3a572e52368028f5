"""Every layout opens to the same logits; what does not fit is named; real shapes have the known key list."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from config.errors import CheckpointError
from config.plan import cache_rows
from models.args import ModelArgs
from models.arithmetic import CPU, METAL, Quantization
from models.attention.attention import Span
from models.experts.experts import Experts
from models.glm_moe_dsa import Model
from models.linear import Linear
from models.loading.building import infer_quantization
from models.loading.loading import load_model, make_geometry, open_checkpoint, read_config
from models.loading.tensor_names import is_unused, to_model_names
from tests.checkpoints import open_model, save_packed
from tests.glm52 import GLM52
from tests.grids import few
from tests.models.make_golden import GOLDEN, LENGTHS, SEED
from tests.tiny_glm import SCHEDULES, SHARED, TINY, Array, fuse_experts, make_weights, save_checkpoint, tokens
from tests.tiny_model import MemoryExperts, logits, make_model

WIDE = SHARED | {  # widths that every packing's groups divide
    "hidden_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 32,
    "intermediate_size": 128, "moe_intermediate_size": 128,
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_both_layouts_that_transformers_saves_give_the_reference_logits(
    schedule: str, layout: str, tmp_path: Path
) -> None:
    config = SCHEDULES[schedule]
    weights = make_weights(config, SEED)
    saved = weights if layout == "separate" else fuse_experts(weights, config)
    model = open_model(save_checkpoint(tmp_path, config, saved)).model
    length = LENGTHS[-1]
    golden = load_file(GOLDEN)[f"{schedule}.{length}"]
    assert np.abs(logits(model, tokens(config, length)) - golden).max() <= 1e-5


@pytest.mark.parametrize(
    "packing",
    few(
        [
            *[Quantization(64, bits) for bits in (2, 3, 4, 5, 6, 8)],
            Quantization(32, 4),
            Quantization(128, 4),
            Quantization(32, 4, "mxfp4"),
            Quantization(16, 4, "nvfp4"),
            Quantization(32, 8, "mxfp8"),
        ],
        [Quantization(64, 4), Quantization(64, 3), Quantization(32, 4, "mxfp4")],
    ),
    ids=str,
)
def test_a_packed_checkpoint_computes_what_its_unpacked_values_compute(
    packing: Quantization, tmp_path: Path
) -> None:
    weights = make_weights(WIDE, SEED)
    packed = open_model(save_packed(tmp_path, WIDE, weights, lambda path: packing)).model
    plain = make_model(WIDE, unpacked(weights, packing))
    ids = tokens(WIDE, 30)
    assert np.abs(logits(packed, ids) - logits(plain, ids)).max() <= 1e-4


def unpacked(weights: dict[str, Array], q: Quantization) -> dict[str, Array]:
    """The values that a packed checkpoint of these weights stands for, in the separate layout."""
    args = ModelArgs.from_config(WIDE)
    out = {}
    for name, w in weights.items():
        value = mx.array(w)
        if name.endswith("kv_b_proj.weight"):
            renamed = to_model_names({name: value}, args)
            embed_q, unembed_out = [round_trip(part, q) for part in renamed.values()]
            value = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1).reshape(value.shape)
        elif w.ndim > 1 and not name.endswith("mlp.gate.weight"):
            value = round_trip(value, q)
        elif not name.endswith("mlp.gate.weight") and not name.endswith("e_score_correction_bias"):
            value = value.astype(mx.bfloat16)
        out[name] = np.array(value.astype(mx.float32))
    return out


def round_trip(w: mx.array, q: Quantization) -> mx.array:
    packed = mx.quantize(w.astype(mx.bfloat16), q.group_size, q.bits, q.mode)
    biases = packed[2].astype(mx.float32) if q.mode == "affine" else None
    scales = packed[1].astype(mx.float32) if q.mode == "affine" else packed[1]
    return mx.dequantize(packed[0], scales, biases, q.group_size, q.bits, q.mode, dtype=mx.float32)


def test_overrides_missing_from_config_are_inferred_and_may_differ_within_an_expert(tmp_path: Path) -> None:
    def mixed(path: str) -> Quantization | None:
        if path.endswith("down_proj"):
            return Quantization(64, 3)
        if path.endswith(("q_b_proj", "shared_experts.up_proj")):
            return Quantization(32, 8)
        return None if "indexer" in path else Quantization(64, 4)

    weights = make_weights(WIDE, SEED)
    whole = logits(open_model(save_packed(tmp_path, WIDE, weights, mixed)).model, tokens(WIDE, 30))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "quantization"})
    )
    assert np.array_equal(logits(open_model(tmp_path).model, tokens(WIDE, 30)), whole)


def test_the_mtp_layer_and_indexers_of_shared_layers_are_left_out(tmp_path: Path) -> None:
    weights = make_weights(SHARED, SEED)
    extra = {
        name.replace("layers.10.", "layers.11."): w for name, w in weights.items() if "layers.10." in name
    }
    extra |= {
        name.replace("layers.6.", "layers.5."): w
        for name, w in weights.items()
        if "layers.6.self_attn.ind" in name
    }
    model = open_model(save_checkpoint(tmp_path, SHARED, weights | extra)).model
    golden = load_file(GOLDEN)["shared.32"]
    assert np.abs(logits(model, tokens(SHARED, 32)) - golden).max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "missing model.norm.weight"),
        ({"model.layers.2.self_attn.o_proj.bias": (64,)}, "unexpected model.layers.2.self_attn.o_proj.bias"),
        ({"model.layers." + "9" * 5000 + ".x.weight": (1,)}, "unexpected model.layers.9999"),
        (
            {"model.norm.weight": (63,)},
            r"model.norm.weight is .63,., not .64,. .in model-0000.-of-00002.safetensors",
        ),
        ({"model.norm.weight": (0, 2**40)}, r"model-.*\.safetensors: model.norm.weight is .0, 1099511627776"),
        (
            {"model.layers.0.self_attn.kv_b_proj.weight": (100, 32)},
            r"kv_b_proj.weight is .100, 32., not .112,",
        ),
        ({"model.layers.4.mlp.experts.7.up_proj.weight": None}, "experts.7.up_proj.weight is missing"),
        ({"model.layers.0.self_attn.q_a_proj.weight_scale_inv": (1, 1)}, "glmserve convert"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named_before_anything_is_loaded(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    weights: dict[str, Any] = make_weights(SHARED, SEED)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = np.zeros(shape, np.float32)
    save_checkpoint(tmp_path, SHARED, weights)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "stored_as"),
    [
        ("model.layers.0.self_attn.q_a_proj.weight", mx.uint8, "mlx.core.uint8"),  # FP8 without scales
        ("model.norm.weight", mx.int32, "I32"),
        ("model.layers.0.self_attn.o_proj.scales", mx.int32, "I32"),
    ],
)
def test_trunk_tensors_of_the_right_shape_but_other_numbers_are_named(
    name: str, dtype: mx.Dtype, stored_as: str, tmp_path: Path
) -> None:
    def choose(path: str) -> Quantization | None:
        return Quantization(64, 4) if path.endswith("o_proj") else None

    save_packed(tmp_path, WIDE, make_weights(WIDE, SEED), choose)
    change_tensors(tmp_path, lambda given, array: array.astype(dtype) if given == name else array)
    with pytest.raises(CheckpointError, match=rf"{name} is stored as {stored_as}"):
        open_checkpoint(tmp_path)


def cut(array: mx.array) -> mx.array:
    return array[:, : array.shape[1] // 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_proj.biases": None}, "missing layer 4, experts' up_proj.biases"),
        ({"up_proj.scales": cut, "up_proj.biases": cut}, r"up_proj.scales is .64, 2., not .128, 2."),
        ({"down_proj.weight": cut, "down_proj.scales": cut, "down_proj.biases": cut}, r"down_proj.weight is"),
        ({"up_proj.biases": lambda a: a.astype(mx.uint32)}, "up_proj.biases is stored as mlx.core.uint32"),
        ({"up_proj.scales": None}, "up_proj of the experts is quantised but has no scales"),
        ({"up_proj.weight": lambda a: a[..., :14]}, "up_proj: weight .* is no packing of 128 inputs"),
        ({"up_proj.scales": lambda a: a[..., :1]}, r"up_proj.biases is .128, 2., not .128, 1."),
    ],
)
def test_experts_that_do_not_fit_the_config_are_refused_before_anything_is_loaded(
    changes: dict[str, Callable[[mx.array], mx.array] | None], message: str, tmp_path: Path
) -> None:
    def change(name: str, array: mx.array) -> mx.array | None:
        kind = name.removeprefix("model.layers.4.mlp.switch_mlp.")
        if kind not in changes:
            return array
        made = changes[kind]
        return None if made is None else mx.contiguous(made(array))

    save_packed(tmp_path, WIDE, make_weights(WIDE, SEED), lambda path: Quantization(64, 4))
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["glm4_moe", "glm4_moe_lite", "deepseek_v32", None])
def test_other_models_are_refused_with_what_is_supported(model_type: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"glmserve runs GLM-5, 5\.1, 5\.2 and 5\.3"):
        read_config(tmp_path)


def test_a_config_of_sizes_that_no_matrix_has_is_one_clear_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SHARED, make_weights(SHARED, SEED))
    config = SHARED | {"n_shared_experts": 2**30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: its sizes make matrices that MLX cannot hold"):
        open_checkpoint(tmp_path)


def test_a_packed_kv_b_is_refused_before_anything_is_loaded_with_what_to_do(tmp_path: Path) -> None:
    save_packed(tmp_path, WIDE, make_weights(WIDE, SEED), lambda path: Quantization(64, 4))

    def whole(name: str, array: mx.array) -> mx.array | None:
        return None if ".embed_q." in name or ".unembed_out." in name else array

    change_tensors(tmp_path, whole)
    tensors = cast(dict[str, mx.array], mx.load(str(tmp_path / "model.safetensors")))
    packed = mx.quantize(mx.zeros((4 * (128 + 32), 128)), 64, 4)
    kinds = dict(zip(("weight", "scales", "biases"), packed, strict=True))
    tensors |= {f"model.layers.0.self_attn.kv_b_proj.{kind}": array for kind, array in kinds.items()}
    mx.eval(tensors)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"kv_b_proj.*cannot be split.*glmserve convert SRC DST"):
        open_checkpoint(tmp_path)


def test_a_kv_b_beside_its_own_parts_is_refused(tmp_path: Path) -> None:
    """Which of the two counted was a matter of their order."""
    weights = make_weights(WIDE, SEED)
    save_packed(tmp_path, WIDE, weights, lambda path: None)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    save_file({name: weights[name]}, tmp_path / "model-more.safetensors")
    with pytest.raises(CheckpointError, match=r"(kv_b_proj|embed_q|unembed_out)\.weight .* a second time"):
        open_checkpoint(tmp_path)


def test_a_config_nested_without_end_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_fewer_experts_than_the_config_says_are_refused(tmp_path: Path) -> None:
    weights = make_weights(SHARED | {"n_routed_experts": 4}, SEED)
    weights |= {n: w for n, w in make_weights(SHARED, SEED).items() if "mlp.gate." in n}
    save_checkpoint(tmp_path, SHARED, weights)
    with pytest.raises(CheckpointError, match=r"describes 8 experts.*hold 4"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("words", "groups"), [(9, 1), (14, 1), (8, 0), (8, 4)])
def test_scales_that_fit_no_packing_are_refused(words: int, groups: int) -> None:
    weight, scales = mx.zeros((8, words), dtype=mx.uint32), mx.zeros((8, groups))
    with pytest.raises(CheckpointError, match="no packing of 64 inputs"):
        infer_quantization("x", weight, scales, 64)


# The real shapes: names and shapes only.


def parameters(model: Model) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def test_a_uniform_mxfp4_checkpoint_at_the_real_shapes_has_2489_tensors() -> None:
    """78 x 16 attention and norms, 21 x 8 indexers, 3 x 6 dense, 75 x 14 sparse, 5 around them."""
    args = ModelArgs.from_config(GLM52)
    no_bank = cast(Any, MemoryExperts(dataclasses.replace(args, first_k_dense_replace=78), {}))
    model = Model(args, CPU, lambda layer: Experts(layer, no_bank, {}, CPU))
    for _, module in model.named_modules():
        if isinstance(module, Linear):
            module.pack(Quantization(32, 4, "mxfp4"))
    shapes = {name: array.shape for name, array in parameters(model)}
    trunk = len(shapes) + 1  # the embedding's scales
    routed = 75 * 3 * 2
    assert trunk + routed == 2489
    assert shapes["model.layers.0.self_attn.embed_q.weight"] == (64, 512, 192 // 8)
    assert shapes["model.layers.77.self_attn.unembed_out.scales"] == (64, 256, 512 // 32)
    assert "model.layers.77.self_attn.indexer.wk.weight" not in shapes
    assert shapes["model.layers.74.self_attn.indexer.wq_b.weight"] == (32 * 128, 2048 // 8)
    assert not any(is_unused(name, args) for name in shapes)


def test_the_geometry_counts_what_the_model_holds(tmp_path: Path) -> None:
    weights = make_weights(WIDE, SEED)
    opened = open_model(save_packed(tmp_path, WIDE, weights, lambda path: Quantization(64, 4)))
    geometry = make_geometry(opened.checkpoint, CPU)
    held = sum(array.nbytes for _, array in parameters(opened.model))
    assert geometry.trunk_bytes == held
    banks = [sum(a.nbytes for a in opened.store.bank(layer).values()) for layer in range(3, 11)]
    assert [8 * nbytes for nbytes in geometry.expert_bytes] == banks
    cache = opened.model.make_cache()
    for rows in cache.parts:
        rows.append(mx.zeros((256, rows.state.shape[1])))
    assert cache.nbytes == cache_rows(256) * geometry.context_bytes_per_token


def test_the_geometry_counts_control_paths_in_float32_where_the_rest_is_not(tmp_path: Path) -> None:
    """Public checkpoints store the router in bfloat16; on a GPU it takes twice as much."""
    save_packed(tmp_path, WIDE, make_weights(WIDE, SEED), lambda path: Quantization(64, 4))
    in_bfloat16 = (".mlp.gate.weight", ".e_score_correction_bias")
    change_tensors(
        tmp_path, lambda name, array: array.astype(mx.bfloat16) if name.endswith(in_bfloat16) else array
    )
    opened = open_model(tmp_path, arithmetic=METAL)
    held = sum(array.nbytes for _, array in parameters(opened.model))
    assert make_geometry(opened.checkpoint, METAL).trunk_bytes == held


@pytest.mark.parametrize("rows", few([20, 70], [70]))
@pytest.mark.slow
def test_a_checkpoint_in_float16_is_computed_in_the_activations_own_type(tmp_path: Path, rows: int) -> None:
    def choose(path: str) -> Quantization | None:
        return None if "indexer" in path else Quantization(32, 4)

    save_packed(tmp_path, WIDE, make_weights(WIDE, SEED), choose)
    change_tensors(tmp_path, lambda _, a: a.astype(mx.float16) if a.dtype == mx.bfloat16 else a)
    model = open_model(tmp_path, arithmetic=METAL).model
    hidden = model(mx.array(tokens(WIDE, rows)), [Span(model.make_cache(), 0, rows)])
    assert hidden.dtype == mx.bfloat16
    indexer = [array.dtype for name, array in parameters(model) if ".indexer.w" in name]
    assert set(indexer) == {mx.float16}


def change_tensors(directory: Path, change: Callable[[str, mx.array], mx.array | None]) -> None:
    """Replace or, with None, remove tensors of a checkpoint of one file."""
    path = directory / "model.safetensors"
    before = cast(dict[str, mx.array], mx.load(str(path)))
    changed = {name: change(name, array) for name, array in before.items()}
    after = {name: array for name, array in changed.items() if array is not None}
    mx.eval(after)
    mx.save_safetensors(str(path), after, {"format": "mlx"})


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SHARED, make_weights(SHARED, SEED))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_of_one_file_needs_no_index(tmp_path: Path) -> None:
    weights = make_weights(SHARED, SEED)
    save_checkpoint(tmp_path, SHARED, weights)
    for path in tmp_path.glob("model*"):
        path.unlink()
    save_file(weights, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).args.num_hidden_layers == 11


@pytest.mark.parametrize("fault", ["removed", "cut", "replaced"])
def test_a_trunk_that_changes_after_its_header_was_read_is_refused_by_name(
    tmp_path: Path, fault: str
) -> None:
    weights = make_weights(TINY, SEED)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "one", TINY, weights))
    path = min(entry.path for entry in checkpoint.trunk.values())
    if fault == "removed":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        other = save_checkpoint(tmp_path / "two", TINY, make_weights(TINY, SEED + 1))
        (other / path.name).replace(path)
    source = cast(Any, MemoryExperts(checkpoint.args, weights))
    with pytest.raises(
        CheckpointError, match=r"model.*\.safetensors.* (cannot be read|was replaced or changed)"
    ):
        load_model(checkpoint, CPU, source)
