"""The tiny tokenizer, as the server's tests need it."""

from pathlib import Path

import pytest

from server.glm.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import build_tokenizer


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
