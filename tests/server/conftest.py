"""A tiny tokenizer with GLM's tags, and small pieces shared by the server's tests."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from server.glm.tokenizer import Tokenizer, load_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "what is the weather in Oslo today?",
    "hello there",
]


def build_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: 256 bytes, some merges, then the added tokens, the tags not flagged as special."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return inner


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with nothing but a tokenizer and its end-of-turn ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    inner = build_tokenizer()
    inner.save(str(folder / "tokenizer.json"))
    ids = [inner.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The tiny tokenizer, loaded as the server loads one."""
    return load_tokenizer(tokenizer_folder)
