"""Banks that grow and shrink under way: every resident expert is where the books say, whole, and no byte more
is held than the slots take."""

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.banks import SharedBank
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed, Policy
from streaming.files.floats import Bytes
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.memory import start_measuring
from tests.streaming.expert_files import separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk
from tests.streaming.test_store import assert_holds

NUM_EXPERTS = 10
K = 2


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ExpertIndex:
    directory = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    write_safetensors(directory / "model-1.safetensors", stacked(rng, [1], NUM_EXPERTS))
    write_safetensors(directory / "model-2.safetensors", separate(rng, [2], NUM_EXPERTS))
    return ExpertIndex.from_entries(read_headers(directory))


@contextmanager
def opened(
    index: ExpertIndex, num_slots: int, *, in_place: bool = True, disk: FaultyDisk | None = None
) -> Iterator[ExpertStore]:
    store = ExpertStore(
        index, num_slots, float_dtype=mx.float32, num_threads=3, shares_memory=in_place, disk=disk
    )
    try:
        yield store
    finally:
        store.close()


def nearness() -> Policy:
    return LeastNearlyChosen(NUM_EXPERTS, K)


def residents(store: ExpertStore, layer: int) -> list[int]:
    return [expert for expert in range(NUM_EXPERTS) if expert in store._layers[layer].books]


def assert_whole(index: ExpertIndex, store: ExpertStore) -> None:
    """The books balance, and what they say of every layer is true."""
    store.check_integrity()
    for layer in index.layers:
        books = store._layers[layer].books
        assert all(len(array) == books.num_slots for array in store.bank(layer).values())
        for expert in residents(store, layer):
            assert_holds(index, store, layer, books.slot(expert), expert)


layers = st.sampled_from([1, 2])
experts = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=5, unique=True).map(sorted)
wanted = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS, unique=True).map(sorted)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), layers, experts),
        st.tuples(st.just("expect"), layers, experts),
        st.tuples(st.just("sweep"), layers, wanted),
        st.tuples(st.just("leave a sweep"), layers, wanted),
        st.tuples(st.just("resize"), layers, st.integers(1, NUM_EXPERTS + 2)),
        st.tuples(st.just("follow"), layers, st.sampled_from([LeastRecentlyUsed, nearness])),
    ),
    max_size=20,
)


def act(index: ExpertIndex, store: ExpertStore, action: str, layer: int, what: Sequence[int]) -> None:
    match action:
        case "acquire":
            group = what[: store.num_slots(layer)]
            for slot, expert in zip(store.acquire(layer, group).tolist(), group, strict=True):
                assert_holds(index, store, layer, slot, expert)
        case "expect" if store.looks_ahead(layer):
            store.expect(layer, [[expert] for expert in what])
        case "sweep" | "leave a sweep":
            seen = []
            for places in store.sweep(layer, {e: 1 + e % 3 for e in what}, 2):
                for place in places:
                    seen.append(place.expert)
                    parts = {name: array[place.slot] for name, array in place.arrays.items()}
                    expected = _first_words(index, layer, place.expert)
                    assert np.array(parts["gate_proj.weight"]).tobytes() == expected
                if action == "leave a sweep":
                    return
            assert seen == what


def _first_words(index: ExpertIndex, layer: int, expert: int) -> bytes:
    [piece] = [piece for piece in index.pieces(layer, expert) if piece.part.name == "gate_proj.weight"]
    return piece.path.read_bytes()[piece.offset :][: piece.part.nbytes]


@settings(max_examples=80, deadline=None)
@given(script=actions, num_slots=st.sampled_from([1, 3, 6, NUM_EXPERTS]), in_place=st.booleans())
def test_whatever_happens_before_and_after_a_resize_each_slot_holds_the_bytes_of_the_file(
    index: ExpertIndex, script: list[tuple[str, int, object]], num_slots: int, in_place: bool
) -> None:
    with opened(index, num_slots, in_place=in_place) as store:
        for action, layer, what in script:
            before = residents(store, layer)
            if action == "resize":
                assert isinstance(what, int)
                store._layers[layer]._land_ahead()
                before = residents(store, layer)
                store.resize(layer, what)
                assert store.num_slots(layer) == min(what, NUM_EXPERTS)
                after = residents(store, layer)
                assert set(after) <= set(before), "a resize brings nothing"
                assert len(after) == min(len(before), what), "and gives up no more than it must"
            elif action == "follow":
                store.follow(what)  # type: ignore[arg-type]
                assert residents(store, layer) == before
            else:
                act(index, store, action, layer, what)  # type: ignore[arg-type]
            assert_whole(index, store)


@pytest.mark.parametrize("in_place", [True, False])
def test_those_go_first_that_the_policy_would_give_up_first(index: ExpertIndex, in_place: bool) -> None:
    with opened(index, 6, in_place=in_place) as store:
        for expert in (3, 9, 1, 7, 5, 0):
            store.acquire(1, [expert])
        store.acquire(1, [3])
        store.resize(1, 3)
        assert residents(store, 1) == [0, 3, 5]
        assert store.statistics().evictions == 3
        store.resize(1, 6)
        reads = store.statistics().misses
        store.acquire(1, [0, 3, 5])
        assert store.statistics().misses == reads, "what is resident is not read again"
        assert_whole(index, store)


def test_a_new_policy_takes_over_the_order_of_the_old_one(index: ExpertIndex) -> None:
    scores = np.array([[-0.1 * expert for expert in range(NUM_EXPERTS)]], np.float32)
    with opened(index, 4) as store:
        store.follow(nearness)
        assert store.watches_scores(1)
        store.observe(1, scores)
        store.acquire(1, [2, 4, 6, 8])
        store.follow(LeastRecentlyUsed)
        assert not store.watches_scores(1)
        store.resize(1, 2)
        assert residents(store, 1) == [2, 4], "6 and 8 came least near to being chosen"


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_given_up_goes_back_and_no_more_than_a_bank_is_held_meanwhile(
    index: ExpertIndex, in_place: bool
) -> None:
    with opened(index, NUM_EXPERTS, in_place=in_place) as store:
        for layer in index.layers:
            store.acquire(layer, range(NUM_EXPERTS))
        slot_bytes = store.slot_bytes // store.total_slots
        for layer in index.layers:
            before = start_measuring()
            store.resize(layer, 4)
            assert before - mx.get_active_memory() >= (NUM_EXPERTS - 4) * slot_bytes
            pages = len(index.parts(layer)) * mmap.PAGESIZE if in_place else 0  # arrays start on one
            assert mx.get_peak_memory() - before <= 4 * slot_bytes + pages + 4096
            assert mx.get_cache_memory() == 0
        assert store.slot_bytes == 8 * slot_bytes


def test_a_guess_under_way_is_given_up_and_its_late_bytes_are_nobodys(index: ExpertIndex) -> None:
    """Its slot becomes that of an expert that was there already."""
    started, release, returned = threading.Event(), threading.Event(), threading.Event()

    def hang(number: int, buffer: Bytes, offset: int) -> int | None:
        if started.is_set():
            return None
        started.set()
        release.wait()
        buffer[:] = 0xAB
        threading.Timer(0.05, returned.set).start()
        return len(buffer)

    disk = FaultyDisk()
    with opened(index, 6, disk=disk) as store:
        store.acquire(2, [5])
        disk.fault = hang
        store.expect(2, [[9]])
        assert started.wait(5)
        store.acquire(2, [6])
        assert store._layers[2].books.slot(6) == 2
        store.resize(2, 3)
        assert store._layers[2].books.slot(6) == 1, "where the guess was on its way to"
        store.check_integrity()
        release.set()
        assert returned.wait(5)
        assert_whole(index, store)


def test_a_bank_for_which_there_is_no_memory_stays_as_it_was(
    index: ExpertIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(index, 4) as store:
        store.acquire(1, [0, 1, 2, 3])

        def refuse(bank: SharedBank, num_slots: int) -> None:
            raise RuntimeError("[malloc] Unable to allocate")

        monkeypatch.setattr(SharedBank, "_make", refuse)
        for num_slots in (8, 2):
            with pytest.raises(RuntimeError, match="Unable to allocate"):
                store.resize(1, num_slots)
            assert store.num_slots(1) == 4
            assert_whole(index, store)
