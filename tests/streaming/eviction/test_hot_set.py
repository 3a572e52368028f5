"""A store that starts again has the experts that the one before it had, and nothing else changes."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from streaming.eviction.hot_set import SAVE_INTERVAL_S, HotSet
from streaming.files.floats import Bytes
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.faulty_disk import FaultyDisk
from tests.streaming.test_resize import index as index
from tests.streaming.test_resize import opened
from tests.streaming.test_store import assert_holds

USED = {1: [[4, 7], [0, 9], [7, 8]], 2: [[3, 5], [5, 6]]}


@pytest.fixture(params=[True, False], ids=["in place", "staged"])
def store(index: ExpertIndex, request: pytest.FixtureRequest) -> Iterator[ExpertStore]:
    with opened(index, 6, in_place=request.param) as made:
        yield made


def use(store: ExpertStore) -> None:
    for layer, steps in USED.items():
        for experts in steps:
            store.acquire(layer, experts)


def bring_all(hot_set: HotSet) -> None:
    while hot_set.advance():
        pass


@pytest.mark.parametrize("num_slots", [3, 4, 6])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_best_that_there_is_room_for_are_there_again(
    index: ExpertIndex, store: ExpertStore, tmp_path: Path, num_slots: int, in_place: bool
) -> None:
    use(store)
    HotSet(store, tmp_path / "hot", "model").save()
    with opened(index, num_slots, in_place=in_place) as again:
        bring_all(HotSet(again, tmp_path / "hot", "model"))
        before = store.least_worth_first()
        assert again.least_worth_first() == {layer: best[-num_slots:] for layer, best in before.items()}
        counts = again.statistics()
        assert (counts.hits, counts.misses, counts.evictions, counts.stall_s) == (0, 0, 0, 0)
        for layer, experts in again.least_worth_first().items():
            for expert, slot in zip(sorted(experts), again.acquire(layer, sorted(experts)), strict=True):
                assert_holds(index, again, layer, slot, expert)
        assert again.statistics().misses == 0
        again.check_integrity()


def test_what_a_request_has_brought_meanwhile_keeps_its_place(
    index: ExpertIndex, store: ExpertStore, tmp_path: Path
) -> None:
    use(store)
    HotSet(store, tmp_path / "hot", "model").save()
    with opened(index, 3) as again:
        again.acquire(1, [1, 2])
        bring_all(HotSet(again, tmp_path / "hot", "model"))
        assert set(again.least_worth_first()[1]) == {1, 2, 8}
        assert again.statistics().evictions == 0


def test_a_read_that_fails_ends_it_and_nothing_else(
    index: ExpertIndex, store: ExpertStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(store)
    HotSet(store, tmp_path / "hot", "model").save()

    def broken(number: int, buffer: Bytes, offset: int) -> int | None:
        raise OSError(errno.EIO, "Input/output error")

    disk = FaultyDisk(broken)
    with opened(index, 6, disk=disk) as again:
        hot_set = HotSet(again, tmp_path / "hot", "model")
        assert not hot_set.advance()
        assert not hot_set.advance()
        assert "Input/output error" in caplog.text
        disk.fault = None
        again.acquire(1, [4, 7])
        again.check_integrity()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"fingerprint": "model"}',
        '{"fingerprint": "other", "layers": {"1": [1]}}',
        '{"fingerprint": "model", "layers": {"x": [1]}}',
        '{"fingerprint": "model", "layers": {"1": ["x"]}}',
        '{"fingerprint": "model", "layers": [1]}',
        '{"fingerprint": "model", "layers": {"77": [1]}}',
        '{"fingerprint": "model", "layers": {"1": [-1, 10, 400]}}',
    ],
)
def test_a_file_of_another_model_or_a_damaged_one_brings_nothing(
    store: ExpertStore, tmp_path: Path, text: str
) -> None:
    (tmp_path / "hot").write_text(text)
    bring_all(HotSet(store, tmp_path / "hot", "model"))
    assert store.num_resident == 0
    use(store)


def test_ids_that_stand_twice_or_are_none_are_passed_over(store: ExpertStore, tmp_path: Path) -> None:
    (tmp_path / "hot").write_text(json.dumps({"fingerprint": "model", "layers": {"1": [5, 5, -3, 99, 5, 2]}}))
    bring_all(HotSet(store, tmp_path / "hot", "model"))
    assert store.least_worth_first()[1] == [5, 2]
    store.check_integrity()


def test_it_is_saved_every_few_minutes_and_never_from_an_empty_store(
    store: ExpertStore, tmp_path: Path
) -> None:
    now = [0.0]
    hot_set = HotSet(store, tmp_path / "hot", "model", clock=lambda: now[0])
    hot_set.save()
    assert not (tmp_path / "hot").exists(), "a server that is stopped at once keeps what the last one knew"
    use(store)
    hot_set.save_when_due()
    now[0] = SAVE_INTERVAL_S
    assert not (tmp_path / "hot").exists()
    hot_set.save_when_due()
    assert json.loads((tmp_path / "hot").read_text())["layers"]["2"] == store.least_worth_first()[2]


def test_a_folder_that_cannot_be_written_is_said_and_harms_nothing(
    store: ExpertStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(store)
    HotSet(store, tmp_path / "nowhere" / "hot", "model").save()
    assert "No such file or directory" in caplog.text
    assert isinstance(store.bank(1)["gate_proj.weight"], mx.array)
