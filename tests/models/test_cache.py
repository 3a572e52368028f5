"""Caches hold what was appended, cut together, and grow without holding twice their size."""

import mlx.core as mx
import numpy as np

from config.plan import KV_STEP
from models.args import ModelArgs
from models.cache import RowCache, SequenceCache
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


def test_growth_is_bounded() -> None:
    cache = RowCache(4, mx.float32)
    for n in (1, 254, 1, 1, 1000, 3000):
        cache.append(mx.zeros((n, 4)))
        assert cache.nbytes == -(-cache.length // KV_STEP) * KV_STEP * 16, "what the plan counts on"


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
