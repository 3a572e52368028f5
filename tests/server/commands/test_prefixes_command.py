"""`glmserve prefixes`: from one copy of a checkpoint to another, and a clear no where that cannot be."""

import shutil
from pathlib import Path

import pytest

from models.arithmetic import choose_arithmetic
from models.attention.cache import cache_bytes_per_token
from models.loading.fingerprint import cache_fingerprint
from models.loading.loading import open_checkpoint
from server.cli import main
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, as_tokens, root_key
from tests.checkpoints import save_packed
from tests.tiny_glm import WIDER, make_weights
from tests.tiny_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_packed(folder, WIDER, make_weights(WIDER, 3), lambda path: None)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def open_files(checkpoint: Path, directory: Path) -> BlockFiles:
    opened = open_checkpoint(checkpoint)
    return BlockFiles(directory, cache_fingerprint(checkpoint, opened.args, choose_arithmetic()), 10**9)


def first_block(checkpoint: Path) -> Block:
    opened = open_checkpoint(checkpoint)
    root = root_key(cache_fingerprint(checkpoint, opened.args, choose_arithmetic()))
    num_bytes = 64 * cache_bytes_per_token(opened.args, choose_arithmetic().dtype.size)
    return Block(root, 0, as_tokens(range(64)), as_tokens(range(num_bytes // 4)).view("u1"))


def run(action: str, file: Path, checkpoint: Path, directory: Path, *more: str) -> int:
    flags = ["--model", str(checkpoint), "--prefix-cache-dir", str(directory), *more]
    return main(["prefixes", action, str(file), *flags])


def test_saved_prompts_go_to_another_copy_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, copy, file = (tmp_path / name for name in ("here", "there", "copy", "prompts.tar"))
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)  # of another time
    assert open_files(checkpoint, here).write(first_block(checkpoint))
    assert run("export", file, checkpoint, here) == 0
    assert capsys.readouterr().out.startswith("exported 1 blocks, 64 tokens, ")
    assert run("import", file, copy, there) == 0
    assert first_block(copy).name != first_block(checkpoint).name
    assert open_files(copy, there).read(first_block(copy).name) is not None
    assert run("import", file, copy, there) == 0
    assert "1 were there already" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_is_said_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, other, file = (tmp_path / name for name in ("here", "there", "other", "prompts.tar"))
    assert open_files(checkpoint, here).write(first_block(checkpoint))
    assert run("export", file, checkpoint, here, "--pinned") == 2
    assert "no pinned prompts" in capsys.readouterr().err
    assert run("export", file, checkpoint, here) == 0
    save_packed(other, WIDER, make_weights(WIDER, 4), lambda path: None)
    assert run("import", file, other, there) == 2
    assert "another checkpoint" in capsys.readouterr().err
    assert run("import", file, checkpoint, there, "--prefix-cache-size", "0") == 2
    assert main(["prefixes", "export"]) == main(["prefixes", "frobnicate", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 3
    assert "glmserve prefixes export FILE" in error
