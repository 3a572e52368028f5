"""Grammars are compiled once, small ones do not wait for large ones, and large ones have a limit together."""

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import llguidance.numpy
import pytest
from llguidance import LLMatcher

from config.plan import SMALL_GRAMMAR_BYTES
from server.engine.decode import token_masks
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import start_sampling
from server.engine.decode.token_masks import MAX_LATEST, Grammars, Matcher
from server.engine.schedule.limits import Limits
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.sequence import Sequence
from server.link.messages import Generate, Sampling
from tests.server.engine.fakes import FakeCache

STOPS = frozenset([0])
LARGE = SMALL_GRAMMAR_BYTES + 1


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were compiled, in order."""
    texts: list[str] = []

    def make(tokens: object, grammar: str, **options: object) -> LLMatcher:
        texts.append(grammar)
        return LLMatcher(tokens, grammar, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(token_masks, "LLMatcher", make)
    return texts


@pytest.fixture
def make(tokenizer_folder: Path) -> Callable[[int], Grammars]:
    return lambda limit: Grammars(tokenizer_folder, 320, limit)


def grammar(name: str) -> str:
    return f'start: "{name}"\n'


@pytest.mark.parametrize("num_bytes", [0, SMALL_GRAMMAR_BYTES, LARGE])
def test_a_grammar_is_compiled_once_for_all_answers(
    make: Callable[[int], Grammars], compiled: list[str], num_bytes: int
) -> None:
    grammars = make(4 * LARGE)
    first = grammars.make_matcher(grammar("a"), STOPS, num_bytes)
    second = grammars.make_matcher(grammar("a"), STOPS, num_bytes)
    assert compiled == [grammar("a")]
    for matcher in (first, second):
        matcher.start()
    first.accept(97)
    assert second._mask
    assert second._mask.result().any(), "each stands where it stands"
    grammars.make_matcher(grammar("a"), frozenset([1]), num_bytes)
    assert len(compiled) == 2, "another end is another grammar"


def test_only_the_latest_grammars_are_kept(make: Callable[[int], Grammars], compiled: list[str]) -> None:
    grammars = make(10**9)
    for number in range(MAX_LATEST + 5):
        grammars.make_matcher(grammar(f"a{number}"), STOPS)
    grammars.make_matcher(grammar(f"a{MAX_LATEST}"), STOPS)
    assert len(compiled) == MAX_LATEST + 5
    grammars.make_matcher(grammar("a0"), STOPS)
    assert len(compiled) == MAX_LATEST + 6


def is_done(coming: "Future[Matcher]", seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not coming.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return coming.done()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_large_grammars_wait_until_others_end_and_small_ones_do_not(
    make: Callable[[int], Grammars], number: int
) -> None:
    grammars = make(number * LARGE)
    running = [grammars.make_matcher(grammar(f"r{index}"), STOPS, LARGE) for index in range(number)]
    waiting = grammars.begin_matcher(grammar("w"), STOPS, LARGE)
    for index in range(3):
        assert is_done(grammars.begin_matcher(grammar(f"s{index}"), STOPS, SMALL_GRAMMAR_BYTES))
    assert not is_done(waiting, 0.2)
    running.pop()
    gc.collect()
    assert is_done(waiting)


def test_a_large_grammar_that_is_wrong_gives_its_room_back(make: Callable[[int], Grammars]) -> None:
    grammars = make(LARGE)
    for text in ("start: what\n", "start: %json {", "start: /(/\n"):
        failed = grammars.begin_matcher(text, STOPS, LARGE)
        assert is_done(failed)
        assert failed.exception()
        del failed
    gc.collect()
    assert is_done(grammars.begin_matcher(grammar("right"), STOPS, LARGE))


@pytest.mark.parametrize(("seconds", "is_slow"), [(0.0, False), (0.06, True), (0.3, True)])
def test_a_grammar_whose_masks_take_long_sits_steps_out(
    make: Callable[[int], Grammars], monkeypatch: pytest.MonkeyPatch, seconds: float, is_slow: bool
) -> None:
    """Else everybody's step waits for the mask of one client's costly schema."""
    fill, release = llguidance.numpy.fill_next_token_bitmask, threading.Event()

    def fill_slowly(*given: Any) -> None:
        time.sleep(seconds)
        fill(*given)

    monkeypatch.setattr(llguidance.numpy, "fill_next_token_bitmask", fill_slowly)
    scheduler = Scheduler(Limits(kv_tokens=1000))
    costly, plain = (decoding(scheduler, name) for name in ("costly", "plain"))
    matcher = costly.constraint._matcher = make(LARGE).make_matcher(grammar("abcdef"), STOPS)
    matcher.start()
    assert scheduler.decode_batch() == [costly, plain], "nothing is known of it yet"
    assert matcher._mask
    allowed = int(matcher._mask.result().argmax())
    for _ in range(2):
        matcher._threads.submit(release.wait)  # the next mask waits
    matcher.accept(allowed)
    later = scheduler.decode_batch()
    scheduler.retire(plain)
    alone, is_resting = scheduler.decode_batch(), scheduler.is_resting
    release.set()
    matcher._mask.result()
    assert later == ([plain] if is_slow else [costly, plain])
    assert alone == ([] if is_slow else [costly]), "commands are taken while it waits for its mask"
    assert is_resting == is_slow
    assert scheduler.decode_batch() == [costly]


def decoding(scheduler: Scheduler, name: str) -> Sequence:
    """A sequence that has drawn its first token."""
    request = Generate(name, (1, 2), 9, Sampling(temperature=0), agent=name)
    sequence = Sequence(request, start_sampling(request.sampling, (1, 2), 64), Constraint(request, None))
    scheduler.add(sequence)
    scheduler.admit(FakeCache)
    sequence.append(97)
    return sequence
