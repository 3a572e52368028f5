"""Recent items stay within their bytes and their time, whatever is added."""

import random

import pytest

from server.api.answer.recent_items import ENTRY_BYTES, KEEP_S, RecentItems


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("most_bytes", [0, 600, 5_000, 100_000])
def test_they_never_take_more_than_they_may(most_bytes: int) -> None:
    items, draw = RecentItems(most_bytes), random.Random(3)
    for _ in range(500):
        name = f"msg_{draw.randrange(40)}"
        items.add(draw.choice("ab"), {"id": name, "text": "ä" * draw.choice([0, 10, 300, 10_000])})
        held = [raw for _, raw in items._items.values()]
        assert items.num_bytes == sum(map(len, held)) + ENTRY_BYTES * len(held) <= most_bytes


def test_the_oldest_go_first_and_one_that_is_too_large_takes_no_other_with_it() -> None:
    items = RecentItems(3 * (ENTRY_BYTES + 20))
    for name in "abc":
        items.add("", {"id": name})
    items.add("", {"id": "d", "text": "x" * 10_000})
    assert [name for name in "abcd" if items.find("", name)] == ["a", "b", "c"]
    items.add("", {"id": "e"})
    assert [name for name in "abcde" if items.find("", name)] == ["b", "c", "e"]


def test_they_are_forgotten_in_time() -> None:
    clock = Clock()
    items = RecentItems(clock=clock)
    items.add("", {"id": "a"})
    clock.now = KEEP_S - 1
    items.add("", {"id": "b"})
    assert items.find("", "a")
    clock.now = KEEP_S + 1
    assert items.find("", "a") is None
    assert items.find("", "b")
    items.add("", {"id": "c"})
    assert items.num_bytes < 2 * (ENTRY_BYTES + 20)
