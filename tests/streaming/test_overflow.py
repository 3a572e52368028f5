"""More experts in one request than there are slots: which of them are there afterwards."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from streaming.eviction.policy import LeastRecentlyUsed
from streaming.store import ExpertStore
from tests.streaming.test_direct import NUM_EXPERTS, assert_hold, write

NUM_SLOTS = 4


class Table(LeastRecentlyUsed):
    """Worth as it is written down."""

    def __init__(self, worths: list[int]) -> None:
        super().__init__()
        self._worths = worths

    def worth(self, expert: int) -> float:
        return self._worths[expert]


@pytest.mark.parametrize("step", [1, -1, 3])
def test_what_is_worth_most_stays_wherever_it_stands_in_the_order(tmp_path: Path, step: int) -> None:
    index = write(tmp_path, 0)
    worths = [step * expert % NUM_EXPERTS for expert in range(NUM_EXPERTS)]
    store = ExpertStore(index, NUM_SLOTS, float_dtype=mx.float32, make_policy=lambda: Table(worths))
    seen: list[int] = []
    for experts, slots in store.take_turns(1, range(NUM_EXPERTS)):
        assert experts == sorted(experts)
        assert_hold(index, store, np.array(slots, np.int32), experts)
        seen += experts
    assert sorted(seen) == list(range(NUM_EXPERTS))
    best = sorted(range(NUM_EXPERTS), key=worths.__getitem__)[-NUM_SLOTS:]
    assert [expert for expert in range(NUM_EXPERTS) if expert in store._layers[1].books] == sorted(best)
    store.check_integrity()
    store.close()


def test_where_every_slot_holds_a_wanted_one_a_few_make_room_for_the_first_reads(tmp_path: Path) -> None:
    index = write(tmp_path, 0)
    store = ExpertStore(index, NUM_SLOTS, float_dtype=mx.float32)
    store.acquire(1, range(NUM_SLOTS))
    turns = store.take_turns(1, range(NUM_EXPERTS))
    experts, slots = next(turns)
    assert experts == [0, 1]  # least recently used
    experts, slots = next(turns)
    assert experts == [2, 3]
    assert_hold(index, store, np.array(slots, np.int32), experts)
    assert store.num_resident == 2, "the disk rests until all that was there is computed with"
    store.close()
