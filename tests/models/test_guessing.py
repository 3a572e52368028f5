"""When the next layer's experts are guessed: by how many rows, and how many slots there are for them."""

from typing import cast

import pytest

from models.arithmetic import CPU
from models.experts.experts import Experts
from streaming.store import ExpertStore


class Slots:
    """A source with so many slots a layer, some experts of which are not there."""

    def __init__(self, count: int) -> None:
        self._count = count

    def num_slots(self, layer: int) -> int:
        return self._count

    def looks_ahead(self, layer: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("rows", "slots", "is_guessed"),
    [(1, 8, True), (4, 16, True), (5, 34, False), (5, 35, True), (8, 55, False), (8, 56, True)],
)
def test_many_rows_guess_only_where_all_that_they_may_want_has_a_slot(
    rows: int, slots: int, is_guessed: bool
) -> None:
    experts = Experts(1, cast(ExpertStore, Slots(slots)), {}, CPU)
    assert experts.can_be_guessed(rows, 8) == is_guessed
