"""Rows that MLX reads as if from a file arrive as they are."""

import mlx.core as mx
import numpy as np
import pytest

from streaming.device_copy import copy_to_device


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16, np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(1,), (37, 24), (3, 5, 7)])
def test_a_row_arrives_bit_for_bit(dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    row = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape)) * 4), np.uint8)
    row = row[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    copied = copy_to_device(row)
    assert copied.shape == shape
    assert np.array(copied.view(mx.uint8)).tobytes() == row.tobytes()


def test_a_row_of_several_is_copied_alone() -> None:
    rows = np.arange(4 * 6, dtype=np.uint32).reshape(4, 6)
    assert copy_to_device(rows[2]).tolist() == rows[2].tolist()
