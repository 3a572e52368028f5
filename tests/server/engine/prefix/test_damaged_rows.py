"""Saved rows that have the right checksum, and of which NaN comes: thrown away, and read anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.link.messages import Generate
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, BlockName
from tests.server.engine.prefix.prefix_runs import (
    FINGERPRINT,
    GREEDY,
    PLENTY,
    CountedModel,
    ask,
    generate,
    make_counted_model,
    open_prefix,
)

PROMPT = [(7 * place) % 60 + 1 for place in range(300)]


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return make_counted_model()


def files_of(folder: Path) -> list[Block]:
    files = BlockFiles(folder, FINGERPRINT, PLENTY)
    names = [BlockName.of_file(file.path.name) for file in sorted(files.list(), key=lambda one: one.start)]
    blocks = [files.read(name) for name in names if name]
    return [block for block in blocks if block]


def poison(folder: Path, which: slice, part: slice = slice(None)) -> None:
    """Write blocks anew in which some rows are NaN; checksum and name are right."""
    files = BlockFiles(folder, FINGERPRINT, PLENTY)
    for block in files_of(folder)[which]:
        payload = block.payload.copy()
        payload[part] = 0xFF
        assert files.write(replace(block, payload=payload))


def save(model: CountedModel, folder: Path, prompt: list[int] = PROMPT) -> None:
    prefix = open_prefix(folder)
    ask(model, prefix, prompt)
    assert prefix.flush(30)
    prefix.close(5)


@pytest.mark.parametrize(
    ("which", "part"),
    [
        (slice(None), slice(None)),  # all
        (slice(0, 1), slice(None)),  # the first of several
        (slice(1, 2), slice(None)),
        (slice(3, 4), slice(0, 40_000)),  # most rows of some layers
        (slice(-2, None), slice(None)),  # the short ends of prompt and answer
    ],
)
def test_the_answer_is_that_without_a_cache_and_the_block_is_gone(
    model: CountedModel, tmp_path: Path, which: slice, part: slice
) -> None:
    plain = ask(model, None, PROMPT)
    save(model, tmp_path)
    whole = {block.name: block.payload.tobytes() for block in files_of(tmp_path)}
    poison(tmp_path, which, part)
    assert {block.name: block.payload.tobytes() for block in files_of(tmp_path)} != whole
    prefix = open_prefix(tmp_path)
    again = ask(model, prefix, PROMPT)
    assert again.tokens == plain.tokens
    assert prefix.flush(30)
    third = ask(model, prefix, PROMPT)
    assert third.tokens == plain.tokens
    assert third.usage.num_cached_tokens > 256, "what was read anew is saved"
    assert prefix.flush(30)
    prefix.check_integrity()
    prefix.close(5)
    for block in files_of(tmp_path):
        if block.tokens.tolist() != PROMPT[block.start : block.start + block.tokens.size]:
            continue  # the end of the answer, which no prompt has asked for
        assert not np.isnan(block.payload.view(np.float32)).any()


def test_others_in_the_same_pass_have_their_answers(model: CountedModel, tmp_path: Path) -> None:
    other = [5, *PROMPT[:90]]
    follower = [*PROMPT[:200], 3, 4, 5]
    plain = [ask(model, None, prompt).tokens for prompt in (PROMPT, other, follower)]
    save(model, tmp_path)
    poison(tmp_path, slice(0, 2))
    prefix = open_prefix(tmp_path)
    requests = [
        Generate(name, tuple(tokens), 8, GREEDY)
        for name, tokens in (("a", PROMPT), ("b", other), ("c", follower))
    ]
    answers = generate(model, prefix, *requests)
    assert [answers[name].tokens for name in "abc"] == plain
    prefix.close(5)
