import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rig.simulated_disk import SimulatedDisk
from config.errors import DiskError
from streaming.files.floats import Bytes
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.layer import Gate
from streaming.store import ExpertStore
from tests.streaming.expert_files import separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk
from tests.streaming.test_store import assert_holds, raise_
from tests.waiting import wait_until

NUM_EXPERTS = 10


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ExpertIndex:
    directory = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    write_safetensors(directory / "model-1.safetensors", stacked(rng, [1], NUM_EXPERTS))
    write_safetensors(directory / "model-2.safetensors", separate(rng, [2], NUM_EXPERTS))
    return ExpertIndex.from_entries(read_headers(directory))


@contextmanager
def opened(
    index: ExpertIndex, num_slots: int, disk: FaultyDisk | None = None, *, in_place: bool = True
) -> Iterator[ExpertStore]:
    store = ExpertStore(
        index,
        num_slots,
        float_dtype=mx.float32,
        disk=disk,
        num_threads=3,
        timeout_s=5,
        shares_memory=in_place,
    )
    try:
        yield store
    finally:
        store.close()


experts = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=4)
steps = st.lists(st.tuples(st.sampled_from([1, 2]), st.booleans(), experts, experts), max_size=30)


@settings(max_examples=60, deadline=None)
@given(steps=steps, num_slots=st.sampled_from([1, 4, 5, 8, NUM_EXPERTS]))
def test_right_and_wrong_guesses_leave_the_bytes_of_the_file_in_every_slot(
    index: ExpertIndex,
    steps: list[tuple[int, bool, list[int], list[int]]],
    num_slots: int,
) -> None:
    with opened(index, num_slots) as store:
        payload = 0
        for layer, is_right, routed, guessed in steps:
            wanted = sorted(set(routed))[:num_slots]
            store.expect(layer, [[expert] for expert in (wanted if is_right else guessed)])
            store.check_integrity()
            fetch = store.begin(layer, wanted)
            for slot, is_here, expert in zip(fetch.slots.tolist(), fetch.is_here, wanted, strict=True):
                if is_here:
                    assert_holds(index, store, layer, slot, expert)
            store.finish(fetch)
            for slot, expert in zip(fetch.slots.tolist(), wanted, strict=True):
                assert_holds(index, store, layer, slot, expert)
            store.check_integrity()
        counts = store.statistics()
        payload = (counts.misses + counts.ahead_arrived) * index.expert_bytes(1)
        assert counts.payload_bytes == payload
        assert counts.hits + counts.misses + counts.ahead_used == sum(
            len(sorted(set(routed))[:num_slots]) for _, _, routed, _ in steps
        )


def test_a_right_guess_is_read_once_and_waited_for_by_whoever_wants_it(index: ExpertIndex) -> None:
    with opened(index, NUM_EXPERTS) as store:
        store.expect(1, [[3], [5]])
        assert_holds(index, store, 1, int(store.acquire(1, [3])[0]), 3)
        wait_until(lambda: all(fill.is_settled for fill in store._layers[1].ahead.values()))
        store.expect(1, [[5]])
        assert_holds(index, store, 1, int(store.acquire(1, [5])[0]), 5)
        counts = store.statistics()
        assert (counts.ahead_started, counts.misses) in [(2, 0), (2, 1), (3, 0), (3, 1)]
        assert counts.ahead_used >= 1


@pytest.mark.parametrize(("num_rows", "most"), [(1, 3), (2, 2), (4, 1)])
def test_the_more_rows_guess_the_fewer_slots_are_given_to_guesses(
    index: ExpertIndex, num_rows: int, most: int
) -> None:
    with opened(index, NUM_EXPERTS - 1) as store:
        guessed = np.arange(2 * num_rows).reshape(2, num_rows) % NUM_EXPERTS
        store.expect(1, guessed.tolist())
        assert store.statistics().ahead_started == min(most, len(np.unique(guessed)))
        store.check_integrity()


def test_a_guess_whose_read_comes_late_never_lands_in_the_slot_of_another_expert(index: ExpertIndex) -> None:
    started, release, returned = threading.Event(), threading.Event(), threading.Event()

    def hang_first(number: int, buffer: Bytes, offset: int) -> int | None:
        if number == 1:
            started.set()
            release.wait()
            buffer[:] = 0xAB
            threading.Timer(0.05, returned.set).start()
            return len(buffer)
        return None

    with opened(index, 4, FaultyDisk(hang_first)) as store:
        store.expect(2, [[9]])
        assert started.wait(5)
        slots = store.acquire(2, [0, 1, 2, 3])  # needs every slot, so the guess gives its own up
        store.check_integrity()
        release.set()
        assert returned.wait(5)
        for slot, expert in zip(slots.tolist(), range(4), strict=True):
            assert_holds(index, store, 2, slot, expert)
        assert_holds(index, store, 2, int(store.acquire(2, [9])[0]), 9)


def test_an_error_of_a_guess_is_nobodys_and_the_expert_is_read_again(index: ExpertIndex) -> None:
    disk = FaultyDisk(lambda number, buffer, offset: raise_(OSError(5, "Input/output error")))
    with opened(index, 8, disk) as store:
        store.expect(1, [[2]])
        wait_until(lambda: all(fill.is_settled for fill in store._layers[1].ahead.values()))
        disk.fault = None
        assert_holds(index, store, 1, int(store.acquire(1, [2])[0]), 2)
        store.check_integrity()


def test_an_error_of_a_guess_that_somebody_waits_for_is_told(index: ExpertIndex) -> None:
    started, release = threading.Event(), threading.Event()

    def fail_late(number: int, buffer: Bytes, offset: int) -> int | None:
        started.set()
        release.wait()
        raise OSError(5, "Input/output error")

    disk = FaultyDisk(fail_late)
    with opened(index, 8, disk) as store:
        store.expect(2, [[2]])
        assert started.wait(5)
        fetch = store.begin(2, [2])
        release.set()
        with pytest.raises(DiskError, match="layer 2, expert 2"):
            store.finish(fetch)
        disk.fault = None
        assert_holds(index, store, 2, int(store.acquire(2, [2])[0]), 2)
        store.check_integrity()


def test_a_fetch_that_was_never_finished_gives_its_slots_back(index: ExpertIndex) -> None:
    with opened(index, 4) as store:
        store.begin(1, [0, 1, 2, 3])
        slots = store.acquire(1, [4, 5, 6, 7])
        for slot, expert in zip(slots.tolist(), range(4, 8), strict=True):
            assert_holds(index, store, 1, slot, expert)
        store.check_integrity()


def test_banks_filled_by_scatter_do_not_look_ahead_and_bring_everything_at_once(index: ExpertIndex) -> None:
    with opened(index, 8, in_place=False) as store:
        assert not store.looks_ahead(1)
        fetch = store.begin(1, [1, 4])
        assert fetch.is_here.all()
        for slot, expert in zip(fetch.slots.tolist(), [1, 4], strict=True):
            assert_holds(index, store, 1, slot, expert)


def test_a_rank_that_does_not_pay_is_shut_and_opens_again_when_it_does() -> None:
    gate = Gate()
    for _ in range(40):
        assert gate.choose([[1], [2]], ())[:1] == [1]
        gate.judge([1])
    assert gate.choose([[1], [2]], ()) == [1]
    for _ in range(40):
        gate.choose([[1], [2]], ())
        gate.judge([1, 2])
    assert gate.choose([[1], [2]], ()) == [1, 2]


def test_what_is_resident_is_neither_read_nor_judged() -> None:
    gate = Gate()
    for _ in range(100):
        assert gate.choose([[1], [2]], [1, 2]) == []
        gate.judge([])
    assert gate.choose([[1, 1], [2, 1]], ()) == [1, 2], "each expert once, by its best rank"


def test_a_disk_never_idles_while_reads_are_queued(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", stacked(np.random.default_rng(0), [0], 8))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    disk = SimulatedDisk(bytes_per_s=2e6, latency_s=1e-4)
    store = ExpertStore(index, 8, float_dtype=mx.float32, disk=disk)
    store.acquire(0, range(8))
    store.close()
    assert len(disk.services) == store.statistics().num_reads
    assert disk.idle_s() == pytest.approx(0.0, abs=1e-9)


def test_an_expert_that_came_ahead_and_was_given_up_again_is_missed_and_no_more(index: ExpertIndex) -> None:
    with opened(index, 4) as store:
        store.expect(1, [[9]])
        wait_until(lambda: all(fill.is_settled for fill in store._layers[1].ahead.values()))
        for _ in store.sweep(1, dict.fromkeys(range(NUM_EXPERTS - 1), 1), 2):
            pass
        assert 9 not in store._layers[1].books
        store.acquire(1, [9])
        counts = store.statistics()
        assert (counts.hits, counts.ahead_used, counts.misses) == (0, 0, 1)
