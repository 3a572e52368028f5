"""Rows leave a cache as bytes and come back without a changed bit."""

import mlx.core as mx
import numpy as np
import pytest

from models.args import ModelArgs
from models.attention.cache import SequenceCache
from models.attention.cache_blocks import bytes_per_token, fill_blocks, read_blocks
from tests.models.make_golden import SEED
from tests.tiny_glm import SHARED, make_weights, tokens
from tests.tiny_model import make_model, run

ARGS = ModelArgs.from_config(SHARED)


def random_cache(dtype: mx.Dtype, length: int) -> SequenceCache:
    cache, rng = SequenceCache(ARGS, dtype), np.random.default_rng(1)
    for part in [*cache.latents, *cache.index_keys.values()]:
        width = part.rows(0, 0).shape[1]
        part.append(mx.array(rng.standard_normal((length, width)).astype(np.float32)))
    return cache


def bits(cache: SequenceCache, stop: int) -> list[bytes]:
    parts = [*cache.latents, *cache.index_keys.values()]
    return [np.array(part.rows(0, stop).view(mx.uint8)).tobytes() for part in parts]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("sizes", [[7], [64, 64, 9], [1, 1, 1]])
def test_blocks_fill_another_cache_with_the_same_bits(dtype: mx.Dtype, sizes: list[int]) -> None:
    cache, other = random_cache(dtype, 150), SequenceCache(ARGS, dtype)
    blocks = read_blocks(cache, 0, sizes)
    assert [block.size for block in blocks] == [size * bytes_per_token(cache) for size in sizes]
    fill_blocks(other, blocks[:1], sizes[:1])
    fill_blocks(other, blocks[1:], sizes[1:])
    other.check_integrity()
    assert other.length == sum(sizes)
    assert bits(other, sum(sizes)) == bits(cache, sum(sizes))


def test_a_cache_goes_on_from_filled_rows_as_from_its_own() -> None:
    model, ids = make_model(SHARED, make_weights(SHARED, SEED)), tokens(SHARED, 40)
    whole, filled = model.make_cache(), model.make_cache()
    run(model, ids[:30], whole)
    fill_blocks(filled, read_blocks(whole, 0, [16, 14]), [16, 14])
    assert np.array_equal(run(model, ids[30:], filled), run(model, ids[30:], whole))


def test_a_block_of_the_wrong_size_leaves_the_cache_as_it_was() -> None:
    cache = random_cache(mx.float32, 10)
    block = read_blocks(cache, 0, [10])[0]
    for damaged in (block[:-4], np.concatenate([block, block[:4]])):
        with pytest.raises((AssertionError, ValueError)):
            fill_blocks(cache, [damaged], [10])
        cache.check_integrity()
        assert cache.length == 10
