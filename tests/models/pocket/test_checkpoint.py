"""What ships: the tokenizer's entries, the packing of the weights, and the layout of the files."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

import models.pocket
from training.pocket.files.pack import pack_codes, unpack_codes
from training.pocket.fit.tokenizer import PLAIN_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE

FOLDER = Path(models.pocket.__file__).parent


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return parsed


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


def test_glms_tokens_are_single_entries_and_only_the_tags_survive(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    for text in (*SPECIAL_TOKENS, *PLAIN_TOKENS):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == [tokenizer.token_to_id(text)]
        assert tokenizer.decode(ids) == ("" if text in SPECIAL_TOKENS else text)


@pytest.mark.parametrize(
    "text", ["a  b\n\n\tc", "Grüße, 東京 🙂", "x_1 = {'k': [1.5, -2]}", " lead and trail "]
)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_name_is_cut_the_same_wherever_it_stands(tokenizer: Tokenizer) -> None:
    alone = tokenizer.encode("Zorbanik", add_special_tokens=False).ids
    inside = tokenizer.encode("to Zorbanik.", add_special_tokens=False).ids
    assert inside[-1 - len(alone) : -1] == alone


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (6, 64), (6, 32), (8, 64)])
def test_mlx_reads_the_packed_codes(bits: int, group: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (4, 128)).astype(np.uint8)
    words = pack_codes(codes, bits)
    assert (unpack_codes(words, bits) == codes).all()
    ones = mx.ones((4, 128 // group))
    values = mx.dequantize(mx.array(words), ones, mx.zeros_like(ones), group_size=group, bits=bits)
    assert (np.array(values) == codes).all()


def test_the_files_are_small_whole_and_aligned() -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, str] = {}
    for path in FOLDER.glob("model-*.safetensors"):
        start, header = header_of(path)
        assert start % 4096 == 0
        assert path.stat().st_size <= 15_000_000
        found |= {name: path.name for name in header if name != "__metadata__"}
    assert found == index
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 30_000_000


def test_the_router_is_left_alone_and_the_experts_have_three_bits(config: dict[str, Any]) -> None:
    quantization = config["quantization"]
    assert quantization == config["quantization_config"]
    assert quantization["model.layers.1.mlp.switch_mlp.up_proj"]["bits"] == 3
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.gate.scales" not in index
    assert config["indexer_types"] == ["full"] * 3 + ["shared"] * 3 + ["full"] + ["shared"] * 2


def test_the_three_ends_of_a_turn_are_resolved_by_string(
    tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    ends = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert config["eos_token_id"] == ends
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == ends
