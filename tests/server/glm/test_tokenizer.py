"""Text to ids and back, and the parting of thought from content."""

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import CheckpointError
from server.engine.decode.token_masks import Grammars
from server.glm.tokenizer import Detokenizer, Tokenizer, load_tokenizer

TEXTS = [
    "hello there",
    " Ærø 👋🏽 日本語\n\ttab",
    "e\u0301\u200d",
    "<tool_call>f<arg_key>k</arg_key></tool_call>",
    "",
]


def detokenize(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(detokenize(tokenizer, ids)) == text


def test_a_character_split_over_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    pieces = detokenize(tokenizer, tokenizer.encode("👋"))
    assert len(pieces) > 2
    assert [piece for piece in pieces if piece] == ["👋"]


def test_broken_utf8_is_replaced_and_the_rest_survives(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a👋")[:-1], *tokenizer.encode("b👋")[:-1]]
    assert "".join(detokenize(tokenizer, ids)) == "a\ufffdb\ufffd"


def test_any_sequence_of_tokens_streams_to_what_it_decodes_to(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [
            token_id
            for token_id in (rng.randrange(400) for _ in range(20))
            if not tokenizer.is_special(token_id)
        ]
        assert "".join(detokenize(tokenizer, ids)) == tokenizer.decode(ids)


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(token_id) for token_id in range(300)} >= {
        bytes([byte]) for byte in range(256)
    }


def test_tags_are_single_tokens_and_not_special(tokenizer: Tokenizer) -> None:
    for tag in ("<think>", "</think>", "<tool_call>", "</arg_value>"):
        [token_id] = tokenizer.encode(tag)
        assert not tokenizer.is_special(token_id)
    [token_id] = tokenizer.encode("<|user|>")
    assert tokenizer.is_special(token_id)
    assert "".join(detokenize(tokenizer, [token_id])) == ""


@pytest.mark.parametrize(
    ("files", "others"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, {5, 6, 7}),
        ({"config.json": {"eos_token_id": None}}, set()),
        ({}, set()),
        ({"config.json": {"eos_token_id": "<|endoftext|>"}}, set()),
        ({"generation_config.json": {"eos_token_id": ["<|endoftext|>", "<|user|>"]}}, set()),
        ({"generation_config.json": {"eos_token_id": "<|observation|>"}}, set()),
        ({"config.json": {"eos_token_id": 1}}, set()),
        ({"generation_config.json": {"eos_token_id": [1, "<|endoftext|>"]}}, set()),
        ({"generation_config.json": {"eos_token_id": [6, 1]}, "config.json": {"eos_token_id": 1}}, {6}),
        ({"config.json": {"eos_token_id": [1]}, "generation_config.json": {"eos_token_id": 8}}, {8}),
        ({"config.json": {"eos_token_id": 999_999}}, set()),
        ({"config.json": {"eos_token_id": [-1, 320, 154820, "<|user|>"]}}, set()),
        ({"generation_config.json": {"eos_token_id": []}}, set()),
    ],
)
def test_ends_of_turns_are_those_of_both_files_and_those_that_glm_has(
    tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path, files: dict[str, Any], others: set[int]
) -> None:
    """Texts stand for their ids. An unknown id and transformers' default end nothing."""
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    for name, content in files.items():
        value = content["eos_token_id"]
        ids = (
            [tokenizer.token_id(one) if isinstance(one, str) else one for one in value or []]
            if (isinstance(value, list))
            else tokenizer.token_id(value)
            if isinstance(value, str)
            else value
        )
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    named = {tokenizer.token_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    assert load_tokenizer(tmp_path).eos_token_ids == named | others


@pytest.mark.parametrize("value", ["5", [5, {"id": 6}], 5.0, {"id": 6}])
def test_ends_of_turns_that_are_no_ids_are_refused(
    tokenizer_folder: Path, tmp_path: Path, value: object
) -> None:
    """With a wrong one answers would not end, or the start would with a traceback."""
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id .* is no token id"):
        load_tokenizer(tmp_path)


def test_a_missing_or_foreign_tokenizer_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="byte-level"):
        load_tokenizer(tmp_path)


def test_others_go_on_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    begun, ended, num_turns = threading.Event(), threading.Event(), 0

    def encode() -> None:
        text = "a long text of many words, " * 20_000
        begun.set()
        tokenizer.encode(text)
        ended.set()

    encoding = threading.Thread(target=encode)
    encoding.start()
    begun.wait()
    while not ended.wait(0.001):
        num_turns += 1
    encoding.join()
    assert num_turns > 10


def without_tags(folder: Path, target: Path, *, moved: int = 0) -> dict[str, int]:
    """Writes a tokenizer.json that knows no tags, and returns their numbers, `moved` further up."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tags = [entry for entry in content["added_tokens"] if not entry["special"]]
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["special"]]
    (target / "tokenizer.json").write_text(json.dumps(content))
    return {entry["content"]: entry["id"] + moved for entry in tags}


@pytest.mark.parametrize("moved", [0, 1, 700])
@pytest.mark.parametrize("form", ["objects", "texts", "added_tokens.json"])
def test_tags_that_only_a_neighbour_of_the_tokenizer_declares_are_tags(
    tokenizer_folder: Path, tmp_path: Path, form: str, moved: int
) -> None:
    tags = without_tags(tokenizer_folder, tmp_path, moved=moved)
    if form == "added_tokens.json":
        (tmp_path / form).write_text(json.dumps(tags))
    else:
        decoder = {
            str(token_id): {"content": tag, "special": False} if form == "objects" else tag
            for tag, token_id in reversed(tags.items())
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    loaded, whole = load_tokenizer(tmp_path), load_tokenizer(tokenizer_folder)
    assert (loaded.think_id, loaded.end_think_id) == (tags["<think>"], tags["</think>"])
    text = "".join(f"a{tag} ü<|user|>" for tag in tags)
    back = {token_id: whole.token_id(tag) for tag, token_id in tags.items()}
    assert [back.get(token_id, token_id) for token_id in loaded.encode(text)] == whole.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.is_special(tags["<think>"]) is (form == "texts")
    grammars = Grammars(tmp_path, 2000)
    matcher = grammars.make_matcher("start: <think> /x/", loaded.eos_token_ids)
    matcher.start()
    allowed = np.array(matcher.apply(mx.zeros(2000))) == 0
    assert np.flatnonzero(allowed).tolist() == [tags["<think>"]]


@pytest.mark.parametrize(
    "declared",
    [
        {"added_tokens_decoder": {"300": {"content": "<mine>"}}},
        {"added_tokens_decoder": {"3": {"content": "<mine>"}}},
        {"added_tokens_decoder": {"900": {"content": "a"}}},
        {"added_tokens_decoder": {"900": {"content": "<a>"}, "901": {"content": "<b>"}, "902": {}}},
        {"added_tokens_decoder": {"x": {"content": "<mine>"}}},
        {"added_tokens_decoder": {"-1": {"content": "<mine>"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "<mine>"}}},
        {"added_tokens_decoder": {"20000000000": {"content": "<mine>"}}},
        {"added_tokens_decoder": {"900": {"content": ["<mine>"]}}},
        {"added_tokens_decoder": ["<mine>"]},
        {"added_tokens_decoder": {"900": None}},
    ],
    ids=lambda declared: str(declared)[:80],
)
def test_declared_tokens_that_do_not_fit_are_refused_in_a_line(
    tokenizer_folder: Path, tmp_path: Path, declared: dict[str, object]
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    with pytest.raises(CheckpointError, match=r"added.token") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {}}', '{"model": {"vocab": []}}', '{"model": 3}']
)
def test_a_tokenizer_that_is_none_is_one_line_whatever_its_neighbours_declare(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    declared = {"added_tokens_decoder": {"900": {"content": "<mine>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
