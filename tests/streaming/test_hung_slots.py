"""Slots into which a read that hangs may yet write: nobody gets them, and nobody else loses one by them."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from config.errors import DiskError
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.test_direct import NUM_EXPERTS, Hang, assert_hold, opened, raw, write
from tests.waiting import wait_until


@pytest.fixture
def index(tmp_path: Path) -> ExpertIndex:
    return write(tmp_path, 8)


@contextmanager
def with_hung_slot(index: ExpertIndex, hang: Hang, num_slots: int) -> Iterator[ExpertStore]:
    """The lowest slot of layer 1 is free, but for a read that hangs."""
    with opened(index, num_slots, hang.disk, timeout_s=0.1) as store:
        with pytest.raises(DiskError, match="no answer"):
            store.acquire(1, [0])
        assert store._filler.is_written(1, 0)
        yield store


def test_a_guess_that_is_wanted_where_others_find_no_slot_gives_its_own_back(index: ExpertIndex) -> None:
    hang = Hang(1)
    with with_hung_slot(index, hang, 3) as store:
        hang._numbers = tuple(range(1, 100))
        store.expect(1, [[4]])
        with pytest.raises(DiskError, match="hold its slots"):
            store.acquire(1, [4, 5, 6])
        hang.release(store)
        store.check_integrity()
        assert_hold(index, store, store.acquire(1, [4, 5, 6]), (4, 5, 6))


def test_a_hung_read_into_a_bank_that_is_gone_holds_no_slot_of_the_next_one(index: ExpertIndex) -> None:
    hang = Hang(1)
    with with_hung_slot(index, hang, 4) as store:
        store.acquire(1, [4, 5, 6])
        store.resize(1, 3)
        assert_hold(index, store, store.acquire(1, [1, 2, 3]), (1, 2, 3))
        hang.release(store)
        assert_hold(index, store, store.acquire(1, [1, 2, 3]), (1, 2, 3))
        store.resize(1, 4)
        assert_hold(index, store, store.acquire(1, [1, 2, 3, 7]), (1, 2, 3, 7))
        store.check_integrity()


def test_a_sweep_whose_order_changes_reads_on_in_the_slots_that_are_left(tmp_path: Path) -> None:
    """Of the ring's four a hung read holds one; one that was there has to be read now, before others."""
    index, hang, wanted = write(tmp_path, 0), Hang(1), dict.fromkeys(range(NUM_EXPERTS), 1)
    with opened(index, 1, hang.disk, timeout_s=0.1) as store:
        with pytest.raises(DiskError, match="no answer"):
            list(store.sweep(1, wanted, 2))
        store.acquire(1, [2])
        seen = []
        for places in store.sweep(1, wanted, 2):
            for place in places:
                weight = np.array(place.arrays["up_proj.weight"][place.slot])
                assert weight.tobytes() == raw(index, 1, place.expert)
                seen.append(place.expert)
            if len(seen) == 2:
                store.acquire(1, [7])  # a step of others, which drives expert 2 out
        assert seen == list(range(NUM_EXPERTS))
        hang.release(store)
        store.check_integrity()


def test_a_hung_read_into_a_staging_row_changes_nothing_of_the_next_expert_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, hang = write(tmp_path, 0), Hang(1)
    with opened(index, 4, hang.disk, timeout_s=0.1, shares_memory=False) as store:
        with pytest.raises(DiskError, match="no answer"):
            store.acquire(1, [0])
        bank = store._layers[1].bank
        really_finish = bank.finish

        def finish(slots: Sequence[int]) -> None:
            """The late bytes arrive when those of the next expert are in its row, and not in its slot yet."""
            hang.release(store)
            really_finish(slots)

        monkeypatch.setattr(bank, "finish", finish)
        assert_hold(index, store, store.acquire(1, [3]), (3,))
        monkeypatch.undo()
        assert_hold(index, store, store.acquire(1, [0, 3]), (0, 3))


def shrink(store: ExpertStore) -> None:
    store.resize(1, 2)


def grow(store: ExpertStore) -> None:
    store.resize(1, NUM_EXPERTS)


def demand_others(store: ExpertStore) -> None:
    store.acquire(1, [4, 5, 6])


def demand_others_in_turns(store: ExpertStore) -> None:
    for _ in store.take_turns(1, [1, 2, 3, 4, 5, 6, 7]):
        pass


@pytest.mark.parametrize("go_on", [shrink, grow, demand_others, demand_others_in_turns])
def test_nobody_waits_for_a_guess_that_hangs_and_is_not_needed(
    index: ExpertIndex, go_on: Callable[[ExpertStore], None]
) -> None:
    hang = Hang(1)
    with opened(index, 4, hang.disk, timeout_s=30) as store:
        store.expect(1, [[0]])
        assert hang.started.wait(5)
        begun_s = time.monotonic()
        go_on(store)
        store.check_integrity()
        assert time.monotonic() - begun_s < 3
        hang.release(store)
        assert_hold(index, store, store.acquire(1, [0, 7]), (0, 7))
        store.check_integrity()


def leave_a_sweep(store: ExpertStore) -> Iterator[None]:
    sweep = store.sweep(1, dict.fromkeys(range(NUM_EXPERTS), 1), 1)
    next(sweep)
    yield
    assert isinstance(sweep, Generator)
    sweep.close()


def sweep_another_layer(store: ExpertStore) -> Iterator[None]:
    store.anticipate_sweep(1)
    yield
    for _ in store.sweep(2, dict.fromkeys(range(NUM_EXPERTS), 1), 1):
        pass


def abandon_a_step(store: ExpertStore) -> Iterator[None]:
    store.begin(1, [0, 1, 2])
    yield
    store.begin(2, [3])


def abandon_turns(store: ExpertStore) -> Iterator[None]:
    store.acquire(1, [7])
    next(store.take_turns(1, [0, 1, 2, 3, 7]))
    yield
    store.acquire(2, [5])


@pytest.mark.parametrize("work", [leave_a_sweep, sweep_another_layer, abandon_a_step, abandon_turns])
def test_work_that_is_given_up_leaves_a_read_that_hangs_behind(
    index: ExpertIndex, work: Callable[[ExpertStore], Iterator[None]]
) -> None:
    """Hangs the first read of expert 1 of layer 1."""
    hang = Hang(1)
    first = min(piece.offset for piece in index.pieces(1, 1))
    hang.disk.fault = lambda number, buffer, offset: (
        hang._fault(1, buffer, offset)
        if offset // 4096 == first // 4096 and not hang.started.is_set()
        else None
    )
    with opened(index, 4, hang.disk, timeout_s=30) as store:
        halves = work(store)
        next(halves)
        assert hang.started.wait(5)
        begun_s = time.monotonic()
        assert next(halves, "done") == "done"
        assert time.monotonic() - begun_s < 3
        hang.release(store)
        for layer in index.layers:
            store.acquire(layer, [1, 2])
        store.check_integrity()


def test_a_slot_that_a_voided_read_still_fills_is_waited_for_where_no_other_is_left(
    index: ExpertIndex,
) -> None:
    hang = Hang(1, 2)
    with opened(index, 4, hang.disk) as store:
        store.begin(1, [0, 1])
        wait_until(lambda: hang.disk.num_reads >= 2)  # else a read of layer 2 would be the second one
        store.acquire(2, [3])  # gives up the step of layer 1
        threading.Timer(0.1, hang.let_go.set).start()
        assert_hold(index, store, store.acquire(1, [4, 5, 6, 7]), (4, 5, 6, 7))
        store.check_integrity()
