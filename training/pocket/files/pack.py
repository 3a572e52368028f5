"""Packs quantisation codes into 32-bit words as MLX does: little-endian bits, crossing word boundaries.

Owns the bit layout and its inverse, in numpy alone.
"""

import numpy as np
from numpy.typing import NDArray


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes [..., n] into words [..., n * bits / 32]."""
    *lead, size = codes.shape
    assert size * bits % 32 == 0, f"{size} codes of {bits} bits do not fill whole 32-bit words"
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(planes.reshape(*lead, size * bits), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


def unpack_codes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Words back into codes."""
    *lead, size = words.shape
    planes = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    planes = planes.reshape(*lead, size * 32 // bits, bits)
    return np.packbits(planes, axis=-1, bitorder="little")[..., 0]
