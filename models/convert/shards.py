"""Safetensors files written piece by piece. Called by the converter.

Tensor data starts on a boundary of 16 KiB, Apple's page, and tensors of whole pages come first, then those of
whole 8 KiB, and so on: each lies on a boundary of the largest power of two that its size is a multiple of, up
to a page. The reader of experts then takes exactly their bytes, straight into the slots. The format allows no
gaps between tensors, so the order is the only way to align them; each tensor of GLM-5.2's experts is a number
of whole pages.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from types import TracebackType

from streaming.disk.disk import MAX_ALIGNMENT
from streaming.files.headers import ITEM_BYTES

PAGE = MAX_ALIGNMENT


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the file to be will be."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class ShardWriter:
    """One file; it takes its name only when everything was written, so a file with that name is whole."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        ordered = sorted(specs.items(), key=lambda item: (-gcd(item[1].nbytes, PAGE), item[0]))
        header, self._offsets = _layout(dict(ordered))
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        _write_fully(self._fd, header, 0)

    def write(self, name: str, start: int, data: bytes) -> None:
        """Writes bytes of a tensor, from its byte `start` on."""
        _write_fully(self._fd, data, self._offsets[name] + start)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if kind is None:
            self._partial.replace(self._path)


def _layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header, padded with spaces as the format allows, and where each tensor starts in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts: dict[str, int] = {}
    end = 0
    for name, spec in specs.items():
        starts[name] = end
        end += spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: data_start + start for name, start in starts.items()
    }


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
