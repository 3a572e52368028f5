"""Saved prompts that come from a slow disk: nobody else waits for it, and it can be left."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.rig.drive import Served, drive
from server.engine.prefix import restore
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule import shared_prefixes
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import Cancel, Finished, Generate, Token
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, BlockName
from tests.server.engine.prefix.prefix_runs import (
    CONFIG,
    GREEDY,
    CountedModel,
    ask,
    make_backend,
    make_counted_model,
    open_prefix,
)
from tests.tiny_glm import tokens

PROMPT = tuple(tokens(CONFIG, 1300))
SHORT = Generate("short", tuple(tokens(CONFIG, 40, seed=2)), 60, GREEDY)
SAVED = Generate("saved", PROMPT, 4, GREEDY)
NEVER_S = 60.0


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return make_counted_model()


@pytest.fixture(scope="module")
def uncached(model: CountedModel) -> list[int]:
    return ask(model, None, PROMPT, 4).tokens


@pytest.fixture(scope="module")
def on_disk(model: CountedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the prompt's blocks."""
    folder = tmp_path_factory.mktemp("prefix")
    prefix = open_prefix(folder)
    ask(model, prefix, PROMPT, 4)
    prefix.close(20)
    return folder


class Gate:
    """Reads wait until it is opened; `num_too_late` counts those that nobody let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.num_too_late = threading.Event(), 0
        read = BlockFiles.read

        def wait_and_read(files: BlockFiles, name: BlockName) -> Block | None:
            self.num_too_late += not self.opened.wait(NEVER_S)
            return read(files, name)

        monkeypatch.setattr(BlockFiles, "read", wait_and_read)


def run(model: CountedModel, prefix: PrefixCache, first: Sequence[Generate], **options: object) -> Served:
    return drive(make_backend(model, 2048), first, prefixes=SavedPrefixes(prefix), **options)  # type: ignore[arg-type]


def test_others_decode_while_a_disk_brings_a_saved_prompt(
    model: CountedModel, on_disk: Path, monkeypatch: pytest.MonkeyPatch, uncached: list[int]
) -> None:
    gate, prefix = Gate(monkeypatch), open_prefix(on_disk)
    gate.opened.set()  # the short prompt looks for its own tail

    def react(served: Served, event: Token | Finished) -> Sequence[Generate]:
        count = len(served.tokens["short"])
        if event.request_id == "short" and count == 5:
            gate.opened.clear()
            return [SAVED]
        if count == 40:
            assert not served.tokens["saved"]
            gate.opened.set()
        return []

    served = run(model, prefix, [SHORT], react=react)
    prefix.close(20)
    assert gate.num_too_late == 0
    assert served.tokens["saved"] == uncached
    assert served.usage["saved"].num_cached_tokens == len(PROMPT) - 1
    assert served.tokens["short"] == ask(model, None, SHORT.token_ids, 60).tokens


def test_a_client_can_leave_while_a_disk_is_waited_for(
    model: CountedModel, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, prefix = Gate(monkeypatch), open_prefix(on_disk)
    monkeypatch.setattr(prefix, "_find_tail", lambda *_: None)  # else the short one asks the disk too

    def leave(served: Served) -> Sequence[Generate | Cancel]:
        return [Cancel("saved"), SHORT] if len(served.beats) == 3 else []

    served = run(model, prefix, [SAVED], on_beat=leave)
    assert len(served.tokens["short"]) == 60
    assert not served.tokens["saved"]
    gate.opened.set()
    prefix.close(20)
    assert gate.num_too_late == 0


def test_a_disk_that_brings_an_unforeseen_error_costs_what_it_did_not_bring(
    model: CountedModel, on_disk: Path, monkeypatch: pytest.MonkeyPatch, uncached: list[int]
) -> None:
    read = BlockFiles.read

    def fail_later(files: BlockFiles, name: BlockName) -> Block | None:
        if name.start >= 700:
            raise RuntimeError("unforeseen")
        return read(files, name)

    monkeypatch.setattr(BlockFiles, "read", fail_later)
    prefix = open_prefix(on_disk)
    model.take_rows()
    assert run(model, prefix, [SAVED]).tokens["saved"] == uncached
    assert model.take_rows() == len(PROMPT) - 8 * 64 + 3, "one group had come"
    prefix.close(20)


def test_a_prompt_that_no_thread_can_be_had_for_is_read(
    model: CountedModel,
    on_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    uncached: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prefix = open_prefix(on_disk)

    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(prefix._readers, "submit", refuse)
    assert run(model, prefix, [SAVED]).tokens["saved"] == uncached
    assert caplog.text.count("could not be restored") == 1, "it was tried for block after block"
    prefix.close(20)


def test_a_disk_that_is_stuck_is_given_up(
    model: CountedModel,
    on_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    uncached: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where all that is looked for is the end of a prompt."""
    gate, prefix = Gate(monkeypatch), open_prefix(on_disk)
    monkeypatch.setattr(restore, "PATIENCE_S", 0.2)
    served = run(model, prefix, [SAVED, SHORT])
    assert served.tokens["saved"] == uncached
    assert len(served.tokens["short"]) == 60
    assert gate.num_too_late == 0
    assert "read anew" in caplog.text
    gate.opened.set()
    prefix.close(20)


def test_a_disk_that_is_stuck_is_not_waited_for_again_until_it_answers(
    model: CountedModel,
    on_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copied = shutil.copytree(on_disk, tmp_path / "copied")
    gate, prefix = Gate(monkeypatch), open_prefix(copied)
    monkeypatch.setattr(restore, "PATIENCE_S", 0.2)
    for number in (1, 2, 3):
        run(model, prefix, [Generate(f"r{number}", PROMPT[number:], 1, GREEDY)])
    assert caplog.text.count("read anew") == 1
    gate.opened.set()
    assert prefix._unanswered
    prefix._unanswered.result(NEVER_S)
    served = run(model, prefix, [SAVED])
    assert served.usage["saved"].num_cached_tokens == len(PROMPT) - 1
    prefix.close(20)


def test_prompts_that_wait_for_the_disk_together_are_restored_one_after_the_other(
    model: CountedModel, on_disk: Path, uncached: list[int]
) -> None:
    prefix = open_prefix(on_disk)
    requests = [Generate(f"r{number}", PROMPT, 4, GREEDY) for number in range(4)]
    served = run(model, prefix, requests)
    assert all(served.tokens[request.request_id] == uncached for request in requests)
    assert all(usage.num_cached_tokens == len(PROMPT) - 1 for usage in served.usage.values())
    prefix.check_integrity()
    prefix.close(20)


def test_whoever_is_restored_goes_on_before_the_others_are(
    model: CountedModel, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has a step to do at first, and the disk is never waited for long."""
    monkeypatch.setattr(shared_prefixes, "COPY_S", 0.0)
    monkeypatch.setattr(shared_prefixes, "LONE_COPY_S", 0.0)
    prefix, num_restored = open_prefix(on_disk), []

    def note(served: Served, event: Token | Finished) -> Sequence[Generate]:
        num_restored.append(prefix.num_restored_tokens)
        return []

    run(model, prefix, [Generate(f"r{number}", PROMPT, 4, GREEDY) for number in range(4)], react=note)
    assert num_restored[0] < 2 * len(PROMPT)
    prefix.close(20)


def test_saved_prompts_that_come_together_share_a_pass_over_what_is_new(
    model: CountedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefixes, "COPY_S", 0.0)
    monkeypatch.setattr(shared_prefixes, "LONE_COPY_S", 1e9)
    prefix = open_prefix()
    for seed in range(4):
        ask(model, prefix, tokens(CONFIG, 1300, seed=seed), 1)
    turns = [(*tokens(CONFIG, 1300, seed=seed), *tokens(CONFIG, 80, seed=9)) for seed in range(4)]
    alone = [ask(model, None, turn, 1).tokens for turn in turns]
    model.take_rows()
    requests = [Generate(f"{i}", turn, 1, GREEDY, agent=f"{i}") for i, turn in enumerate(turns)]
    served = run(model, prefix, requests)
    assert model.rows == [4 * 80]
    assert [served.tokens[request.request_id] for request in requests] == alone


def test_room_for_a_saved_prompt_is_made_once(model: CountedModel) -> None:
    prefix, cache, sizes = open_prefix(), model.make_cache(), list[int]()
    ask(model, prefix, PROMPT, 1)
    restoring_all = prefix.restore(PROMPT, cache)
    is_last = False
    while not is_last:
        assert restoring_all.wait(NEVER_S)
        is_last = restoring_all.advance()
        sizes.append(cache.nbytes)
    assert cache.length == len(PROMPT) - 1
    assert len(sizes) > 2
    assert len(set(sizes)) == 1, "it grew group by group"
