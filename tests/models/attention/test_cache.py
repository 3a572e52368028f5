"""Caches hold what was appended, cut together, and grow without holding twice their size."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.plan import KV_DIVISOR, MAX_RUNNING, cache_rows, most_cache_rows
from models.args import ModelArgs
from models.attention.cache import RowCache, SequenceCache
from tests.memory import start_measuring
from tests.models.make_golden import SEED
from tests.tiny_glm import SHARED, make_weights, tokens
from tests.tiny_model import make_model, run


def test_rows_come_back_as_they_were_appended_in_pieces_of_any_size() -> None:
    cache, rng = RowCache(3, mx.float32), np.random.default_rng(0)
    pieces = [rng.standard_normal((n, 3)).astype(np.float32) for n in (1, 300, 1, 700, 5)]
    for piece in pieces:
        held = cache.append(mx.array(piece))
    assert np.array_equal(np.array(held), np.concatenate(pieces))
    assert cache.length == 1007


def copied_rows(cache: RowCache, num_rows: int) -> int:
    """Appends rows one by one, as decoding does; how many rows growing copied."""
    copied, row = 0, mx.zeros((1, 1))
    for length in range(num_rows):
        before = cache.nbytes
        cache.append(row)
        copied += length if cache.nbytes > before else 0
        if length % 64 == 0:
            mx.eval(cache.state)
    return copied


def test_a_row_is_copied_a_few_times_however_long_the_sequence_becomes() -> None:
    copies = {length: copied_rows(RowCache(1, mx.float32), length) / length for length in (1000, 65_536)}
    assert max(copies.values()) <= KV_DIVISOR + 1


def test_growth_by_steps_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault: a fixed step copies all rows ever more often."""
    monkeypatch.setattr("models.attention.cache.cache_rows", lambda rows: -(-rows // 256) * 256)
    assert copied_rows(RowCache(1, mx.float32), 20_000) / 20_000 > 2 * (KV_DIVISOR + 1)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=MAX_RUNNING))
def test_caches_take_what_the_plan_counts_on(lengths: list[int]) -> None:
    """One large or many small ones, rows that come together or by and by."""
    held = 0
    for i, length in enumerate(lengths):
        cache = RowCache(1, mx.float32)
        if i % 2:
            cache.expect(length)
        for piece in (length // 3, length - length // 3):
            cache.append(mx.zeros((piece, 1)))
        held += cache.nbytes
    assert held <= 4 * most_cache_rows(sum(lengths))


def peak_of_growth(cache: SequenceCache, num_rows: int) -> int:
    """Most bytes held beside the grown cache, while every layer of one lazy step takes a row more."""
    for part in cache.parts:
        part.append(mx.zeros((num_rows, part.state.shape[1])))
    mx.eval([part.state for part in cache.parts])
    assert all(part.state.shape[0] > num_rows for part in cache.parts)
    for part in cache.parts:
        part.append(mx.zeros((part.state.shape[0] - num_rows, part.state.shape[1])))  # full now
    mx.eval([part.state for part in cache.parts])
    start_measuring()
    for part in cache.parts:
        part.append(mx.zeros((1, part.state.shape[1])))
    mx.eval([part.state for part in cache.parts])
    return mx.get_peak_memory() - mx.get_active_memory()


def test_layers_grow_one_after_the_other() -> None:
    args = ModelArgs.from_config(SHARED)
    before = start_measuring()
    cache = SequenceCache(args, mx.float32)
    peak = peak_of_growth(cache, 20_000)
    assert mx.get_active_memory() - before <= cache.nbytes + 4096
    assert peak <= 1.05 * max(part.nbytes for part in cache.parts)


def test_growth_of_all_layers_at_once_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault: growth that is evaluated with the step it belongs to."""

    def reserve(self: RowCache, rows: int) -> None:
        capacity, width = self._buffer.shape
        if rows > capacity:
            extra = mx.zeros((cache_rows(rows) - capacity, width), dtype=self._buffer.dtype)
            self._buffer = mx.concatenate([self._buffer, extra])

    monkeypatch.setattr(RowCache, "_reserve", reserve)
    cache = SequenceCache(ModelArgs.from_config(SHARED), mx.float32)
    assert peak_of_growth(cache, 20_000) > 1.05 * max(part.nbytes for part in cache.parts)


def test_a_row_more_copies_nothing_while_there_is_room() -> None:
    cache = RowCache(64, mx.float32)
    cache.append(mx.zeros((10_000, 64)))
    mx.eval(cache.state)
    before = start_measuring()
    for _ in range(20):
        held = cache.append(mx.zeros((1, 64)))
        mx.eval(held.sum())
        del held
    assert mx.get_peak_memory() - before < cache.nbytes / 10


def test_shared_layers_keep_no_index_keys() -> None:
    cache = SequenceCache(ModelArgs.from_config(SHARED), mx.float32)
    assert sorted(cache.index_keys) == [0, 1, 2, 6, 10]


def test_a_trimmed_sequence_goes_on_as_if_it_had_never_been_longer() -> None:
    model = make_model(SHARED, make_weights(SHARED, SEED))
    ids = tokens(SHARED, 40)
    long, short = model.make_cache(), model.make_cache()
    run(model, ids, long)
    long.trim(25)
    long.check_integrity()
    run(model, ids[:25], short)
    assert long.length == short.length == 25
    assert np.abs(run(model, ids[30:33], long) - run(model, ids[30:33], short)).max() < 1e-6
