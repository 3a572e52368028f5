"""Saved KV through the real loop: the same text with fewer rows, and never a wrong token."""

from collections.abc import Generator, Sequence
from pathlib import Path
from queue import SimpleQueue

import mlx.core as mx
import numpy as np
import pytest

from models.attention.attention import Span
from models.attention.cache_blocks import bytes_per_token
from server.engine.prefix.lookup import PrefixCache
from server.engine.prefix.states import BLOCK_TOKENS
from server.link.messages import Command, Event, Failed, Generate, Shutdown
from streaming.prefix.block_format import HEADER_BYTES
from tests.grids import few
from tests.server.engine.prefix.prefix_runs import (
    CONFIG,
    GREEDY,
    CountedModel,
    ask,
    generate,
    leave_after,
    make_counted_model,
    make_loop,
    open_prefix,
)
from tests.tiny_glm import tokens

NUM_LAYERS = CONFIG["num_hidden_layers"]


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return make_counted_model()


@pytest.mark.parametrize("length", few([1, 2, 63, 64, 65, 66, 128, 150, 300], [1, 64, 65, 150]))
def test_a_prompt_is_not_read_twice_and_the_text_is_the_same(model: CountedModel, length: int) -> None:
    prefix, prompt = open_prefix(), tokens(CONFIG, length)
    uncached = ask(model, None, prompt)
    first = ask(model, prefix, prompt)
    model.take_rows()
    again = ask(model, prefix, prompt)
    assert first.tokens == again.tokens == uncached.tokens
    assert first.usage.num_cached_tokens == 0
    assert again.usage.num_cached_tokens == length - 1, "the last token is always computed"
    assert model.take_rows() == 1 + 7


@pytest.mark.parametrize("rows", [64, 100, 2048])
def test_the_next_turn_pays_for_its_new_tokens_only(model: CountedModel, rows: int) -> None:
    prefix, prompt = open_prefix(), tokens(CONFIG, 100)
    answer = ask(model, prefix, prompt, rows=rows)
    turn = [*prompt, *answer.tokens, *tokens(CONFIG, 50, seed=2)]
    model.take_rows()
    cached = ask(model, prefix, turn, rows=rows)
    assert cached.usage.num_cached_tokens == 100 + 7, "the last token of an answer was never read"
    assert model.take_rows() == 1 + 50 + 7
    assert cached.tokens == ask(model, None, turn, rows=rows).tokens


@pytest.mark.parametrize("shared", few([0, 63, 64, 100, 192, 199], [63, 100]))
def test_prompts_share_what_they_have_in_common_in_whole_blocks(model: CountedModel, shared: int) -> None:
    prefix, one = open_prefix(), tokens(CONFIG, 200, seed=1)
    ask(model, prefix, one)
    other = [*one[:shared], *((token + 1) % 64 for token in one[shared:])]
    cached = ask(model, prefix, other)
    assert cached.usage.num_cached_tokens == shared // BLOCK_TOKENS * BLOCK_TOKENS
    assert cached.tokens == ask(model, None, other).tokens


@pytest.mark.slow
def test_forty_turns_of_a_tool_loop_prefill_their_new_tokens(model: CountedModel) -> None:
    prefix, prompt, rng = open_prefix(), tokens(CONFIG, 100), np.random.default_rng(4)
    for turn in range(40):
        new = tokens(CONFIG, int(rng.integers(1, 30)), seed=turn)
        prompt += new
        model.take_rows()
        answer = ask(model, prefix, prompt, num_tokens=5)
        num_prefilled = model.take_rows() - 4
        assert num_prefilled <= (len(new) + 64 if turn else len(prompt))
        prompt += answer.tokens
    assert answer.tokens == ask(model, None, prompt[:-5], num_tokens=5).tokens


def test_a_block_in_memory_holds_no_more_than_it_counts(model: CountedModel, tmp_path: Path) -> None:
    prefix, prompt = open_prefix(tmp_path), tokens(CONFIG, 150)
    ask(model, prefix, prompt)
    blocks = list(prefix._memory._blocks.values())
    assert len(blocks) == 4, "two whole ones, and the ends of prompt and answer"
    assert all(array.base is None for block in blocks for array in (block.tokens, block.payload))
    prefix.close(20)


def test_a_restart_finds_what_was_on_disk(model: CountedModel, tmp_path: Path) -> None:
    prompt = tokens(CONFIG, 300)
    before = open_prefix(tmp_path)
    first = ask(model, before, prompt)
    before.close(20)
    after = open_prefix(tmp_path)
    again = ask(model, after, prompt)
    assert again.tokens == first.tokens
    assert again.usage.num_cached_tokens == 299
    after.close(20)
    another = open_prefix(tmp_path, fingerprint=bytes(31) + b"\1")
    assert ask(model, another, prompt).usage.num_cached_tokens == 0
    another.close(20)


def test_what_is_written_is_what_the_tokens_take_and_once(model: CountedModel, tmp_path: Path) -> None:
    """1,000 tokens and an answer: each row once, and two short blocks, the ends of prompt and answer."""
    prompt, prefix = tokens(CONFIG, 1000), open_prefix(tmp_path)
    answer = ask(model, prefix, prompt, num_tokens=30)
    ask(model, prefix, prompt, num_tokens=30)
    assert prefix.flush(20)
    num_rows = 1000 + 29
    short = 1000 % 64 + num_rows % 64
    per_token = 4 + bytes_per_token(model.make_cache())
    num_files = num_rows // 64 + 2
    expected = (num_rows // 64 * 64 + short) * per_token + num_files * HEADER_BYTES
    assert len(answer.tokens) == 30
    assert prefix.statistics()["prefix_bytes_written"] == expected
    prefix.close(20)


def test_two_servers_on_one_directory_read_each_others_blocks(model: CountedModel, tmp_path: Path) -> None:
    prompt, one, two = tokens(CONFIG, 200), open_prefix(tmp_path), open_prefix(tmp_path)
    first = ask(model, one, prompt)
    assert one.flush(20)
    again = ask(model, two, prompt)
    assert again.usage.num_cached_tokens == 199
    assert again.tokens == first.tokens
    one.close(20)
    two.close(20)


def test_memory_that_holds_almost_nothing_is_no_obstacle(model: CountedModel, tmp_path: Path) -> None:
    prompt, prefix = tokens(CONFIG, 600), open_prefix(tmp_path)
    first = ask(model, prefix, prompt)
    prefix.close(20)
    small = open_prefix(tmp_path, memory=3 * 64 * 1200)
    again = ask(model, small, prompt)
    assert again.tokens == first.tokens
    assert again.usage.num_cached_tokens == 599
    assert small.statistics()["prefix_memory_bytes"] <= 3 * 64 * 1200
    small.close(20)


@pytest.mark.parametrize("has_disk", [True, False])
def test_a_prompt_that_memory_cannot_hold_is_kept_from_its_beginning(
    model: CountedModel, tmp_path: Path, has_disk: bool
) -> None:
    """Read in one pass, so that all of it comes at once; six blocks and the end of an answer fit."""
    prompt = tokens(CONFIG, 600)
    prefix = open_prefix(tmp_path if has_disk else None, memory=7 * 64 * 1000)
    first = ask(model, prefix, prompt)
    assert prefix.flush(20)
    again = ask(model, prefix, prompt)
    assert again.tokens == first.tokens
    assert again.usage.num_cached_tokens >= 6 * 64
    prefix.check_integrity()
    prefix.close(20)
    if has_disk:
        reopened = open_prefix(tmp_path)
        assert ask(model, reopened, prompt).usage.num_cached_tokens > again.usage.num_cached_tokens
        reopened.close(20)


def test_a_prompt_that_shares_one_that_memory_cannot_hold_does_not_wait_for_its_answer(
    model: CountedModel,
) -> None:
    prefix, prompt = open_prefix(memory=7 * 64 * 1000), tuple(tokens(CONFIG, 600))
    one, other = Generate("one", prompt, 40, GREEDY), Generate("other", (*prompt, 1), 2, GREEDY)
    ends = list(generate(model, prefix, one, other))
    assert ends == ["other", "one"]


def test_damaged_files_cost_time_and_never_a_token(model: CountedModel, tmp_path: Path) -> None:
    prompt, prefix = tokens(CONFIG, 400), open_prefix(tmp_path)
    uncached = ask(model, None, prompt)
    ask(model, prefix, prompt)
    prefix.close(20)
    whole_blocks = [path for path in sorted(tmp_path.glob("*.kv")) if int(path.name.split("-")[0]) < 384]
    contents = {path: path.read_bytes() for path in whole_blocks}
    assert len(contents) == 6
    rng = np.random.default_rng(6)
    for number in range(10):
        for path, whole in contents.items():
            path.write_bytes(whole)
        victim = list(contents)[int(rng.integers(0, len(contents)))]
        place = int(rng.integers(0, 8 * len(contents[victim])))
        damaged = bytearray(contents[victim])
        damaged[place // 8] ^= 1 << place % 8
        victim.write_bytes(damaged if number % 2 else damaged[: place // 8])
        reopened = open_prefix(tmp_path)
        again = ask(model, reopened, prompt)
        assert again.tokens == uncached.tokens
        assert again.usage.num_cached_tokens == int(victim.name.split("-")[0])
        assert reopened.statistics()["prefix_damaged"] == 1
        reopened.close(20)


class DamagedModel(CountedModel):
    """What it computes is no number."""

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        hidden = yield from super().forward(tokens, spans)
        return hidden * mx.nan


@pytest.mark.parametrize("rows", [64, 2048])
def test_rows_that_are_no_numbers_are_not_kept(model: CountedModel, rows: int) -> None:
    """Else whoever begins with the same tokens would get no answer either, also after a restart."""
    prefix, prompt, events = open_prefix(), tokens(CONFIG, 200), list[Event]()
    inbox: SimpleQueue[Command] = SimpleQueue()

    def send(event: Event) -> None:
        events.append(event)
        if isinstance(event, Failed):
            inbox.put(Shutdown())

    inbox.put(Generate("a", tuple(prompt), 4, GREEDY))
    make_loop(DamagedModel(model.inner), prefix, inbox, send, rows).run()
    assert isinstance(events[-1], Failed)
    assert "NaN" in events[-1].message
    assert prefix.count_saved(prompt) == 0


def test_a_prompt_whose_scores_are_wanted_is_read_whole(model: CountedModel) -> None:
    prefix, prompt = open_prefix(), tuple(tokens(CONFIG, 130))
    ask(model, prefix, prompt)
    model.take_rows()
    scored = generate(model, prefix, Generate("a", prompt, 0, GREEDY, score_prompt=True))["a"]
    assert scored.usage.num_cached_tokens == 0
    assert model.take_rows() == 130


def test_what_was_read_before_the_client_left_is_kept(model: CountedModel) -> None:
    prefix, prompt = open_prefix(), tokens(CONFIG, 640)
    leave_after(model, prefix, prompt, num_layers=6 * NUM_LAYERS + 1, rows=64)
    model.take_rows()
    answer = ask(model, prefix, prompt, rows=64)
    assert answer.usage.num_cached_tokens == 6 * 64
    assert model.take_rows() == 4 * 64 + 7
    assert answer.tokens == ask(model, None, prompt, rows=64).tokens


def test_a_client_that_always_leaves_after_half_the_prompt_gets_its_answer(model: CountedModel) -> None:
    """The livelock: retries that never get further than the one before."""
    prefix, prompt = open_prefix(), tokens(CONFIG, 640)
    patience, progress = 5 * NUM_LAYERS, []
    for _ in range(5):
        progress.append(prefix.count_saved(prompt))
        if (len(prompt) - progress[-1]) // 64 * NUM_LAYERS < patience:
            break
        leave_after(model, prefix, prompt, num_layers=patience, rows=64)
    assert progress == sorted(set(progress)), "each attempt starts further on"
    model.take_rows()
    assert ask(model, prefix, prompt, rows=64).tokens == ask(model, None, prompt, rows=64).tokens


@pytest.mark.parametrize("length", [400, pytest.param(4112, marks=pytest.mark.long)])
def test_what_eight_prompts_share_that_arrive_together_is_read_once(model: CountedModel, length: int) -> None:
    prefix, prompt = open_prefix(), tokens(CONFIG, length)
    requests = [Generate(f"r{index}", (*prompt, index, 1), 4, GREEDY) for index in range(8)]
    model.take_rows()
    outcomes = generate(model, prefix, *requests)
    assert model.take_rows() == length + 2 + 7 * (length % 64 + 2) + 8 * 3
    for request in requests[::3]:
        assert outcomes[request.request_id].tokens == ask(model, None, request.token_ids, 4).tokens


def test_pins_are_counted_and_listed_by_conversation(model: CountedModel, tmp_path: Path) -> None:
    """A prompt that goes on where another one ends is one entry; what was never saved pins nothing."""
    prefix, long, other = open_prefix(tmp_path), tokens(CONFIG, 200), tokens(CONFIG, 140, seed=5)
    fork = (*long[:64], *tokens(CONFIG, 70, seed=6))
    for prompt in (long, other, fork):
        ask(model, prefix, prompt)
    assert prefix.pins().result(20) == ()
    unseen, short = tokens(CONFIG, 100, seed=9), long[:63]
    assert [prefix.pin(prompt).result(20) for prompt in (unseen, short)] == [0, 0]
    pinned = [prefix.pin(prompt).result(20) for prompt in (long[:130], long, other, fork)]
    assert pinned == [2, 3, 2, 2]
    found = prefix.pins().result(20)
    assert [one.num_tokens for one in found] == [192, 128, 128]
    assert found[0].first_tokens == tuple(long[:64])
    assert found[0].last_tokens == tuple(long[128:192])
    assert {one.first_tokens for one in found[1:]} == {tuple(other[:64]), tuple(long[:64])}
    assert prefix.pin(other, is_pinned=False).result(20) == 2
    assert prefix.pin(other, is_pinned=False).result(20) == 0
    assert len(prefix.pins().result(20)) == 2
    prefix.close(20)


def test_clearing_forgets_everything(model: CountedModel, tmp_path: Path) -> None:
    prompt, prefix = tokens(CONFIG, 200), open_prefix(tmp_path)
    ask(model, prefix, prompt)
    assert prefix.count_saved(prompt) == 192
    prefix.pin(prompt)
    assert prefix.flush(20)
    assert prefix.statistics()["prefix_pinned_blocks"] == 3
    prefix.clear()
    assert prefix.flush(20)
    assert not list(tmp_path.iterdir())
    assert prefix.count_saved(prompt) == 0
    assert ask(model, prefix, prompt).usage.num_cached_tokens == 0
    prefix.close(20)


def test_the_books_balance_after_random_conversations(model: CountedModel, tmp_path: Path) -> None:
    prefix: PrefixCache = open_prefix(tmp_path, memory=20 * 64 * 1200)
    rng = np.random.default_rng(8)
    conversations = [tokens(CONFIG, 100, seed=seed) for seed in range(3)]
    for _ in range(8):
        talk = conversations[int(rng.integers(0, 3))]
        talk += tokens(CONFIG, int(rng.integers(1, 90)), seed=int(rng.integers(0, 99)))
        answer = ask(model, prefix, talk, num_tokens=4)
        assert answer.tokens == ask(model, None, talk, num_tokens=4).tokens
        talk += answer.tokens
        prefix.check_integrity()
    prefix.close(20)
