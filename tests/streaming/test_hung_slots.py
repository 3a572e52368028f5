"""Slots into which a read that hangs may yet write: nobody gets them, and nobody else loses one by them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from config.errors import DiskError
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.test_direct import NUM_EXPERTS, Hang, assert_hold, opened, raw, write


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
