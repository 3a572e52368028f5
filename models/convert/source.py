"""Rows of a Hugging Face checkpoint's tensors, decoded: BF16, F16, F32, and FP8 with block scales.

Owns nothing but names and places. Called by the converter, a block of rows at a time, so that no tensor is
ever whole in memory.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from config.errors import CheckpointError
from streaming.files.floats import FLOATS
from streaming.files.headers import FP8, ITEM_BYTES, TensorEntry


class Source:
    """Reads rows; a tensor of any rank is seen as rows of its last dimension."""

    def __init__(self, entries: Mapping[str, TensorEntry], block_shape: tuple[int, int] = (128, 128)) -> None:
        self.entries = entries
        self._block_shape = block_shape
        for name, entry in entries.items():
            if entry.dtype == FP8:
                _check_scale(entry, entries.get(scale_name(name)), block_shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def decoded_dtype(self, name: str) -> str:
        """The safetensors dtype that `rows` decodes to: FP8 becomes BF16, the others stay."""
        dtype = self.entries[name].dtype
        if dtype == FP8:
            return "BF16"
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{self.entries[name].path}: {name} is {dtype}; only BF16, F16, F32 and FP8 convert"
            )
        return dtype

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop`, [stop - start, width], in `decoded_dtype`."""
        entry = self.entries[name]
        raw = _read_rows(entry, start, stop)
        if entry.dtype == FP8:
            return self._scaled(name, mx.from_fp8(mx.array(raw), mx.float32), start, stop)
        if entry.dtype == "BF16":
            return mx.array(raw.view(np.uint16)).view(mx.bfloat16)
        return mx.array(raw.view({"F16": np.float16, "F32": np.float32}[entry.dtype]))

    def _scaled(self, name: str, values: mx.array, start: int, stop: int) -> mx.array:
        """FP8 values times their block's scale; the last block of either dimension may be cut short."""
        height, width = self._block_shape
        scales = self.entries[scale_name(name)]
        table = self.rows(scale_name(name), 0, scales.shape[0]).astype(mx.float32)
        by_row = table[mx.arange(start, stop) // height]  # [rows, blocks across]
        return (values * mx.repeat(by_row, width, axis=1)[:, : values.shape[1]]).astype(mx.bfloat16)


def _check_scale(weight: TensorEntry, scale: TensorEntry | None, block_shape: tuple[int, int]) -> None:
    """From the headers: a conversion takes hours, and should not end at a scale that does not fit."""
    if scale is None:
        raise CheckpointError(f"{weight.path}: {weight.name} is FP8 and {scale_name(weight.name)} is missing")
    if scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{scale.path}: {scale.name} is {scale.dtype}; scales of FP8 are {', '.join(FLOATS)}"
        )
    expected = tuple(-(-size // block) for size, block in zip(weight.shape, block_shape, strict=False))
    if len(weight.shape) != 2 or scale.shape != expected:
        raise CheckpointError(
            f"{scale.path}: {scale.name} is {scale.shape}, not {expected} as {weight.shape} needs in "
            f"blocks of {block_shape[0]} x {block_shape[1]}"
        )


def scale_name(name: str) -> str:
    return name + "_scale_inv"


def _read_rows(entry: TensorEntry, start: int, stop: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    row_bytes = (entry.shape[-1] if entry.shape else 1) * ITEM_BYTES[entry.dtype]
    num_bytes = (stop - start) * row_bytes
    try:
        raw = np.fromfile(entry.path, np.uint8, count=num_bytes, offset=entry.offset + start * row_bytes)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: {entry.name}: {error.strerror}") from error
    if len(raw) != num_bytes:
        raise CheckpointError(f"{entry.path}: {entry.name} ends early; the file was cut while it was read")
    return raw.reshape(stop - start, row_bytes)
