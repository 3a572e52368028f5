"""What loading or a prompt takes beside trunk, experts and caches: within its lines, and most of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from models import workspace
from models.arithmetic import CPU, METAL, Arithmetic, Quantization
from models.attention.attention import Span, make_parts
from models.dsa_computing import FLOAT32
from models.loading.loading import load_model, make_geometry, open_checkpoint
from models.workspace import loading_bytes
from streaming.store import ExpertStore
from tests.checkpoints import Opened, open_model, save_packed
from tests.grids import few
from tests.memory import peak_of, start_measuring
from tests.models.make_golden import SEED
from tests.tiny_glm import TINY, make_weights, save_checkpoint, tokens

# Few layers of experts so wide that their weights are most of what a short prompt takes.
HEAVY = TINY | {
    "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "n_routed_experts": 4,
    "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 3 + ["sparse"], "index_topk": 512,
}  # fmt: skip


@pytest.fixture(scope="module", params=[3, 4, 8])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    def packed(path: str) -> Quantization | None:
        return Quantization(64, request.param) if ".mlp." in path else None

    folder = tmp_path_factory.mktemp("heavy")
    return open_model(save_packed(folder, HEAVY, make_weights(HEAVY, SEED), packed))


def measured_and_planned(opened: Opened, ids: list[int]) -> tuple[int, int]:
    cache, length = opened.model.make_cache(), len(ids)
    peak = peak_of(lambda: mx.eval(opened.model(mx.array(ids), [Span(cache, 0, length)])))
    geometry = make_geometry(opened.checkpoint, CPU, length)
    planned = geometry.workspace_bytes + length * geometry.sweep_row_bytes
    return peak - cache.nbytes, planned


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_prompt_stays_within_its_lines(opened: Opened, length: int, is_repeated: bool) -> None:
    ids = [7] * length if is_repeated else tokens(HEAVY, length)
    measured, planned = measured_and_planned(opened, ids)
    assert measured <= planned


def test_the_weights_that_lie_unpacked_are_most_of_a_short_prompt(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant the fault: a plan that knows the unpacked weights and not what unpacking takes beside them."""
    measured, planned = measured_and_planned(opened, tokens(HEAVY, 40))
    assert measured > 0.6 * planned
    monkeypatch.setattr(workspace, "UNPACKED_COPIES", dict.fromkeys(range(9), 1))
    assert measured > measured_and_planned(opened, tokens(HEAVY, 40))[1]


# A trunk of which no tensor is more than a part, beside small experts.
LARGE_TRUNK = TINY | {
    "vocab_size": 1024, "hidden_size": 256, "num_attention_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "intermediate_size": 1024,
}  # fmt: skip


@pytest.mark.parametrize("arithmetic", [CPU, METAL], ids=lambda a: a.name)
@pytest.mark.parametrize("layout", ["original", "packed"])
@pytest.mark.parametrize("dtype", few([mx.bfloat16, mx.float16, mx.float32], [mx.bfloat16]), ids=str)
def test_loading_takes_a_tensor_more_than_what_it_loads(
    dtype: mx.Dtype, layout: str, arithmetic: Arithmetic, tmp_path: Path
) -> None:
    """Plant the fault, a file at a time: half as much again as the trunk."""
    weights = make_weights(LARGE_TRUNK, SEED)
    if layout == "original":
        save_checkpoint(tmp_path, LARGE_TRUNK, weights)
    else:
        save_packed(tmp_path, LARGE_TRUNK, weights, lambda path: None)
    for path in tmp_path.glob("model*.safetensors"):
        stored = cast(dict[str, mx.array], mx.load(str(path)))
        tensors = {name: array.astype(dtype) for name, array in stored.items()}
        mx.eval(tensors)
        mx.save_safetensors(str(path), tensors)
        del stored, tensors
    checkpoint = open_checkpoint(tmp_path)
    store = ExpertStore(checkpoint.experts, 8, float_dtype=arithmetic.dtype)
    before = start_measuring()
    model = load_model(checkpoint, arithmetic, store)
    peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
    trunk = make_geometry(checkpoint, arithmetic).trunk_bytes
    beside = loading_bytes(checkpoint.trunk, arithmetic, FLOAT32)
    small = 20_000  # scalars of the modules
    assert abs(held - trunk) < small
    assert peak <= trunk + beside + small
    assert beside < trunk / 8
    assert make_geometry(checkpoint, arithmetic, 1).workspace_bytes >= beside
    store.close()
    del model


# A router so wide that the scores of a whole prompt are more than all else.
MANY = TINY | {
    "n_routed_experts": 512, "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 3 + ["sparse"],
}  # fmt: skip
SMALL_TILES = [replace(CPU, tile_elements=2**12), replace(METAL, tile_elements=2**16)]


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tmp_path_factory.mktemp("many"), MANY, make_weights(MANY, SEED), lambda path: None)


@pytest.mark.parametrize(("length", "part_rows"), few([(150, 100), (600, 60), (700, 64)], [600]))
@pytest.mark.parametrize("arithmetic", SMALL_TILES, ids=lambda a: a.name)
@pytest.mark.slow
def test_a_prompt_of_several_parts_stays_within_its_lines(
    arithmetic: Arithmetic, length: int, part_rows: int, many_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of once: the routing of all rows was evaluated at once."""
    monkeypatch.setattr("models.glm_moe_dsa.make_parts", partial(make_parts, num_rows=part_rows))
    monkeypatch.setattr(workspace, "PART_ROWS", part_rows)
    opened = open_model(many_experts, arithmetic=arithmetic)
    cache, ids = opened.model.make_cache(), tokens(MANY, length)
    peak = peak_of(lambda: mx.eval(opened.model(mx.array(ids), [Span(cache, 0, length)])))
    geometry = make_geometry(opened.checkpoint, arithmetic, length)
    assert peak - cache.nbytes <= geometry.workspace_bytes + length * geometry.sweep_row_bytes


@pytest.mark.parametrize("part_rows", [33, 40, 48])
def test_no_part_is_written_into_what_others_may_hold(
    part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX copies an array that is written into while anything refers to it: x lay in memory twice."""
    rows, config = 700, TINY | {
        "hidden_size": 1024, "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 3 + ["sparse"],
    }  # fmt: skip
    model = open_model(save_packed(tmp_path, config, make_weights(config, SEED), lambda path: None)).model
    monkeypatch.setattr("models.glm_moe_dsa.make_parts", partial(make_parts, num_rows=part_rows))
    before = start_measuring()
    steps = model.forward(mx.array(tokens(config, rows)), [Span(model.make_cache(), 0, rows)])
    while next(steps) != model.num_layers - 2:  # all dense ones
        pass
    assert mx.get_peak_memory() - before < 1.9 * rows * config["hidden_size"] * 4
