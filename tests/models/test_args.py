"""The indexer schedule and what config.json must say."""

from typing import Any

import pytest

from config.errors import CheckpointError
from models.args import ModelArgs, indexer_schedule
from models.attention.cache import cache_bytes_per_token
from tests.glm52 import GLM52
from tests.tiny_glm import TINY


def full(config: dict[str, Any]) -> list[int]:
    return [i for i, kind in enumerate(indexer_schedule(config)) if kind == "full"]


def test_frequency_and_offset_give_the_21_full_layers_of_glm_5_2() -> None:
    assert full(GLM52) == [0, 1, 2, *range(6, 75, 4)]
    assert len(full(GLM52)) == 21


def test_without_any_schedule_all_layers_are_full() -> None:
    assert full(TINY) == list(range(11))


def test_an_explicit_list_wins_over_a_pattern_and_a_pattern_over_the_formula() -> None:
    short = {"num_hidden_layers": 4, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    assert full(short | {"index_topk_pattern": "FSFS"}) == [0, 2]
    assert full(short | {"index_topk_pattern": "FSFS", "indexer_types": ["full"] * 4}) == [0, 1, 2, 3]


def test_a_shared_layer_before_any_full_one_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layer 0 is 'shared'"):
        indexer_schedule({"num_hidden_layers": 2, "indexer_types": ["shared", "full"]})


def test_a_schedule_shorter_than_the_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="must name 4 layers"):
        indexer_schedule({"num_hidden_layers": 4, "index_topk_pattern": "FS"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("scoring_func", "softmax"), ("attention_bias", True), ("rope_interleave", False),
     ("tie_word_embeddings", True), ("hidden_act", "gelu"), ("moe_layer_freq", 2)],
)  # fmt: skip
def test_what_would_change_the_numbers_silently_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        ModelArgs.from_config(TINY | {field: value})


@pytest.mark.parametrize("field", ["kv_lora_rank", "num_hidden_layers", "rms_norm_eps"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        ModelArgs.from_config({k: v for k, v in TINY.items() if k != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 0), ("num_hidden_layers", "11"), ("vocab_size", "64"), ("vocab_size", 2**40),
     ("index_topk", 0), ("index_topk", 8.5), ("kv_lora_rank", -32), ("norm_topk_prob", "yes"),
     ("rms_norm_eps", "1e-5"), ("rope_parameters", {"rope_theta": float("nan")}), ("rope_parameters", [1]),
     ("rope_parameters", {"rope_theta": 10**400}), ("routed_scaling_factor", float("inf")),
     ("mlp_layer_types", 3), ("indexer_types", [["full"]] * 11), ("index_topk_pattern", 7),
     ("index_topk_freq", "4"), ("num_experts_per_tok", 9), ("n_group", 3), ("topk_group", 2)],
)  # fmt: skip
def test_a_field_that_nothing_can_be_computed_with_is_one_clear_line(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        ModelArgs.from_config(TINY | {field: value})


def test_layers_without_number_are_refused_before_lists_are_made_of_them() -> None:
    """Two thousand million of them, which an int32 holds, took all of the memory."""
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers 20000 makes no sense"):
        ModelArgs.from_config(TINY | {"num_hidden_layers": 20_000, "mlp_layer_types": None})


def test_without_a_word_on_dense_layers_there_are_three_as_in_transformers() -> None:
    silent = {"mlp_layer_types": None, "first_k_dense_replace": None}
    assert ModelArgs.from_config(TINY | silent).moe_layers == range(3, 11)


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_other_rope_types_are_refused(place: str, spelling: str) -> None:
    with pytest.raises(CheckpointError, match="yarn"):
        ModelArgs.from_config(TINY | {place: {spelling: "yarn", "rope_theta": 1e6}})


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 8e6}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 8e6},
        {"rope_parameters": {"type": "default", "rope_theta": 8e6}, "rope_scaling": None},
        {"rope_theta": 8e6},
        {"rope_theta": 8e6, "rope_scaling": {"type": "default"}, "rope_parameters": None},
        {"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 8e6}},
    ],
    ids=str,
)
def test_rope_theta_is_found_in_all_places_where_transformers_looks(spelling: dict[str, Any]) -> None:
    plain = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    assert ModelArgs.from_config(plain | spelling).rope_theta == 8e6


def test_without_a_word_of_rope_its_theta_is_that_of_transformers() -> None:
    silent = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    assert ModelArgs.from_config(silent).rope_theta == 10000
    assert ModelArgs.from_config(silent | {"rope_scaling": None, "rope_theta": None}).rope_theta == 10000


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        {}, {"rope_type": None}, {"rope_type": "default"}, {"theta": 8e6}, {"base": 8e6},
        {"full_attention": {"rope_theta": 8e6, "rope_type": "default"}}, {"rope_theta": None},
        {"rope_theta": "8e6"}, {"rope_theta": [8e6]}, {"rope_theta": True}, {"rope_theta": 0},
        {"rope_theta": -8e6}, [], "", 8e6, False,
    ],
    ids=str,
)  # fmt: skip
def test_a_rope_without_a_theta_that_can_be_read_is_refused(place: str, rope: object) -> None:
    """Its theta was taken for 10000, which computes nonsense."""
    silent = {name: value for name, value in TINY.items() if name != "rope_parameters"}
    with pytest.raises(CheckpointError, match=r"config\.json: .*rope"):
        ModelArgs.from_config(silent | {place: rope})


@pytest.mark.parametrize(
    ("experts", "groups", "kept_groups", "per_token"),
    [(8, 4, 1, 3), (16, 4, 2, 9), (8, 2, 1, 5), (8, 1, 1, 9)],
)
def test_more_experts_per_token_than_there_are_to_choose_from_are_refused(
    experts: int, groups: int, kept_groups: int, per_token: int
) -> None:
    routing = {"n_routed_experts": experts, "n_group": groups, "topk_group": kept_groups}
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok"):
        ModelArgs.from_config(TINY | routing | {"num_experts_per_tok": per_token})
    ModelArgs.from_config(TINY | routing | {"num_experts_per_tok": experts // groups * kept_groups})


def test_cache_bytes_per_token_are_those_of_the_reference() -> None:
    args = ModelArgs.from_config(GLM52)
    assert cache_bytes_per_token(args, itemsize=2) == 89_856 + 5_376
