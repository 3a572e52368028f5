"""What a checkpoint recommends to sample with: taken as it is, or refused by name."""

import json
from pathlib import Path

import pytest

from config.errors import CheckpointError
from server.glm.files import SamplingDefaults, load_sampling_defaults


def write(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temperature": 1, "top_p": 0.95, "top_k": -1, "eos_token_id": [1]}, SamplingDefaults(1, 0.95, -1)),
        ({"temperature": None, "min_p": 0.1}, SamplingDefaults(min_p=0.1)),
        ({"do_sample": False, "temperature": 1.0}, SamplingDefaults(temperature=0.0)),
        ({}, SamplingDefaults()),
    ],
)
def test_the_recommendation_is_taken(tmp_path: Path, content: object, expected: SamplingDefaults) -> None:
    assert load_sampling_defaults(write(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "x"), ("temperature", -1), ("temperature", float("nan")), ("temperature", True),
        ("top_p", 5), ("top_p", [0.9]), ("top_k", 0.5), ("top_k", 2**40), ("min_p", -0.1),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")),
    ],
)  # fmt: skip
def test_what_nothing_can_be_sampled_with_is_refused_by_name(
    tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name} .* is no number from"):
        load_sampling_defaults(write(tmp_path, {name: value}))


def test_a_file_nested_without_end_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"cannot read .*generation_config\.json"):
        load_sampling_defaults(tmp_path)
