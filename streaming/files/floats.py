"""Types of weights on disk and in memory, for MLX and for NumPy, which has no bfloat16.

Readers' threads run this code: it touches bytes only and leaves the interpreter lock to others while it
copies.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

FLOATS = ("BF16", "F16", "F32")
# By the names of safetensors: what weights may be.
MLX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}
# The NumPy type that carries the values of a safetensors dtype; bfloat16 travels as its 16 bits.
CARRIERS: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
    "U32": np.dtype(np.uint32),
}


def commit(target: npt.NDArray[np.generic], target_dtype: str, raw: Bytes, dtype: str) -> None:
    """Writes the values that `raw` holds as `dtype` into the flat `target`, kept as `target_dtype`.

    A target that is wider than its values must have been zeros once and only ever written by this.
    """
    values = raw.view(CARRIERS[dtype])
    if target_dtype == dtype:
        np.copyto(target, values)
    elif target_dtype == "F32" and dtype == "BF16":
        # The upper half of each; the lower stays zero. One pass, because after each the thread waits for the
        # interpreter lock again.
        np.copyto(target.view(np.uint16)[1::2], values)
    elif target_dtype == "BF16":
        np.copyto(target, bfloat16_bits(_to_float32(values, dtype)))
    else:
        np.copyto(target, _to_float32(values, dtype), casting="same_kind")


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 of each value, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # The carry would turn some NaNs into zero.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _to_float32(values: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
