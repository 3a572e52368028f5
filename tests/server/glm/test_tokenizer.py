"""Text to ids and back, and the parting of thought from content."""

import json
import random
import shutil
import threading
from pathlib import Path

import pytest

from config.errors import CheckpointError
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
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, {5, 6, 7}),
        ({"config.json": {"eos_token_id": None}}, None),
        ({}, None),
    ],
)
def test_end_of_turn_ids_come_from_both_files_or_from_their_names(
    tokenizer_folder: Path, tmp_path: Path, files: dict[str, object], expected: set[int] | None
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    named = {loaded.encode(text)[0] for text in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    assert loaded.eos_token_ids == (named if expected is None else expected)


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
