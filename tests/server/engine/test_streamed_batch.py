"""What a decode batch reads of the experts: once those that its rows want and that are not there."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from models.attention.attention import Span
from models.glm_moe_dsa import Model
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import start_sampling
from server.engine.schedule import sequence
from server.engine.schedule.passes import Pass
from server.engine.schedule.sequence import PassPart
from server.link.messages import Generate
from streaming.banks import Bank
from streaming.fills import Fetch, Fill
from streaming.overflow import Turn
from tests.checkpoints import Opened, open_model, save_packed
from tests.grids import few
from tests.server.engine.test_loop_on_glm import PROMPTS
from tests.tiny_glm import WIDER, make_weights

# Eight rows of four experts each never want more than 32.
CONFIG, SLOTS = WIDER | {"n_routed_experts": 48}, 32


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    folder = save_packed(tmp_path, CONFIG, make_weights(CONFIG, 3), lambda path: None)
    opened = open_model(folder, slots=SLOTS, looks_ahead=False)
    with closing(opened.store):
        yield opened


@pytest.mark.parametrize("width", few([1, 2, 8], [2]))
def test_each_expert_is_asked_for_once_and_the_bytes_are_those_of_the_misses(
    opened: Opened, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, index = opened.store, opened.checkpoint.experts
    parts = [PassPart(make_decoding(opened.model, prompt), 1) for prompt in list(PROMPTS.values())[:width]]
    asked: list[tuple[int, list[int]]] = []
    absent_bytes: list[int] = []
    begin = store.begin

    def record(layer: int, experts: Sequence[int]) -> Fetch:
        asked.append((layer, list(experts)))
        absent_bytes.extend(index.expert_bytes(layer) for e in experts if e not in store._layers[layer])
        return begin(layer, experts)

    monkeypatch.setattr(store, "begin", record)
    num_missed = 0
    for _ in range(8):
        asked.clear()
        absent_bytes.clear()
        before = store.statistics()
        step(opened.model, parts)
        after = store.statistics()
        assert [layer for layer, _ in asked] == list(index.layers), "each layer asks once"
        assert all(experts == sorted(set(experts)) for _, experts in asked), "for each expert once"
        assert all(4 <= len(experts) <= 4 * width for _, experts in asked)
        assert after.misses - before.misses == len(absent_bytes)
        assert after.payload_bytes - before.payload_bytes == sum(absent_bytes)
        num_missed += len(absent_bytes)
    assert num_missed, "the test means nothing where everything is there"


@pytest.mark.parametrize("slots", few([4, 9, 16], [9]))
def test_more_experts_than_slots_are_each_read_once_and_those_that_are_there_not_at_all(
    tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_packed(tmp_path, CONFIG, make_weights(CONFIG, 3), lambda path: None)
    opened = open_model(folder, slots, looks_ahead=False)
    store, index = opened.store, opened.checkpoint.experts
    parts = [PassPart(make_decoding(opened.model, prompt), 1) for prompt in PROMPTS.values()]
    read: list[tuple[int, int]] = []
    absent: list[tuple[int, int]] = []
    make, take_turns, begin = store._filler.make, store.take_turns, store.begin
    num_turns = 0

    def note_read(layer: int, bank: Bank, expert: int, *given: Any, **named: Any) -> Fill:
        read.append((layer, expert))
        return make(layer, bank, expert, *given, **named)

    def note_absent(layer: int, experts: Sequence[int]) -> Fetch:
        absent.extend((layer, e) for e in experts if e not in store._layers[layer].books)
        return begin(layer, experts)

    def note_turns(layer: int, experts: Sequence[int]) -> Iterator[Turn]:
        nonlocal num_turns
        num_turns += 1
        absent.extend((layer, e) for e in experts if e not in store._layers[layer].books)
        return take_turns(layer, experts)

    monkeypatch.setattr(store._filler, "make", note_read)
    monkeypatch.setattr(store, "begin", note_absent)
    monkeypatch.setattr(store, "take_turns", note_turns)
    with closing(store):
        for _ in range(6):
            read.clear()
            absent.clear()
            before = store.statistics()
            step(opened.model, parts)
            after = store.statistics()
            assert sorted(read) == sorted(absent), "what is there stays until it is computed with"
            assert len(set(read)) == len(read)
            assert after.misses - before.misses == len(read)
            assert after.payload_bytes - before.payload_bytes == sum(index.expert_bytes(e) for e, _ in read)
            store.check_integrity()
        assert num_turns, "the test means nothing where all fit"


def make_decoding(model: Model, prompt: tuple[int, ...]) -> sequence.Sequence:
    """A sequence whose prompt has been read, and that has its first token."""
    request, cache = Generate("a", prompt, 50), model.make_cache()
    hidden = model(mx.array(prompt), [Span(cache, 0, len(prompt))])
    sampler = start_sampling(request.sampling, prompt, 64)
    first = int(model.logits(hidden[-1:]).argmax())
    one = sequence.Sequence(request, sampler, Constraint(request, None))
    one.admit(cache)
    one.append(first)
    return one


def step(model: Model, parts: list[PassPart]) -> None:
    one = Pass(model, parts)
    while (hidden := one.advance()) is None:
        pass
    for row, part in enumerate(parts):
        part.sequence.append(int(model.logits(hidden[row : row + 1]).argmax()))
