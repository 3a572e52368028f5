"""Where a bank's memory lies; what is in it is tested through the store."""

import mmap

import mlx.core as mx
import numpy as np
import pytest

from streaming.banks import BankMaker
from streaming.files.index import Part

PARTS = (Part("gate_proj.weight", "U32", (32, 6)), Part("gate_proj.scales", "BF16", (32, 3)))


@pytest.mark.parametrize("float_dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_arrays_start_on_a_page(float_dtype: mx.Dtype, num_slots: int) -> None:
    """A copy to a few bytes past a page takes four times as long on some processors."""
    bank = BankMaker(float_dtype, is_shared=True).make(PARTS, num_slots)
    for part in PARTS:
        array = bank.arrays[part.name]
        assert array.shape == (num_slots, *part.shape)
        carrier = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        assert np.array(carrier, copy=False).ctypes.data % mmap.PAGESIZE == 0
        assert not carrier.astype(mx.float32).any().item()
