"""Rows that MLX reads as if from a file arrive as they are."""

import mlx.core as mx
import numpy as np
import pytest

from streaming.device_copy import HostRows, copy_to_device


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


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16, np.uint8])
@pytest.mark.parametrize("shape", [(1,), (37, 24), (3, 5, 7)])
def test_host_rows_are_zeros_and_arrive_as_they_are_now(
    dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    rows = HostRows(3, shape, dtype)
    assert rows.array.shape == (3, *shape)
    assert not rows.array.any()
    for number in (2, 0):
        rows.array[number] = np.arange(np.prod(shape)).reshape(shape) + number
        arrived = rows.to_device(number)
        assert np.array_equal(np.array(arrived), rows.array[number])
