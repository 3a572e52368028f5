"""Between two groups of a sweep others may use the same bank: what the sweep finds there changes."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import stacked, write_safetensors

NUM_EXPERTS, LAYER = 10, 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExpertStore]:
    write_safetensors(tmp_path / "model.safetensors", stacked(np.random.default_rng(0), [LAYER], NUM_EXPERTS))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    with closing(ExpertStore(index, 6, float_dtype=mx.float32, num_threads=3)) as store:
        yield store
        store.check_integrity()


def rest_of(groups: Iterator[object]) -> int:
    return sum(1 for _ in groups)


def test_what_a_step_has_evicted_is_read_and_what_it_has_brought_is_not(store: ExpertStore) -> None:
    store.acquire(LAYER, range(4, 10))
    groups = iter(store.sweep(LAYER, dict.fromkeys(range(NUM_EXPERTS), 1), 2))
    [first, second] = next(groups)
    assert (first.expert, second.expert) == (0, 1)
    store.acquire(LAYER, [2, 3])  # in the place of two that the sweep has found
    before = store.statistics().sweep_reads
    assert rest_of(groups) == 4
    assert store.statistics().sweep_reads - before == 2
    assert store.statistics().sweep_hits == 6


def test_what_a_step_has_guessed_is_not_admitted_a_second_time(store: ExpertStore) -> None:
    groups = iter(store.sweep(LAYER, dict.fromkeys(range(NUM_EXPERTS), 1), 2))
    next(groups)
    store.expect(LAYER, [[3]])
    assert rest_of(groups) == 4
    store.acquire(LAYER, [3])
    assert store.num_resident <= 6
