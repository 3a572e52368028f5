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
        tensors = {name: (spec.dtype, spec.shape, spec.nbytes) for name, spec in ordered}
        header, self._offsets = layout(tensors, {"format": "mlx"})
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        write_fully(self._fd, header, 0)

    def write(self, name: str, start: int, data: bytes) -> None:
        """Writes bytes of a tensor, from its byte `start` on."""
        write_fully(self._fd, data, self._offsets[name] + start)

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


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a file of these tensors (dtype, shape, bytes), and where each of them starts in the file.

    The header is padded with spaces, as the format allows, so that the first tensor starts on a page.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        starts[name] = end
        end += nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: data_start + start for name, start in starts.items()
    }


def write_fully(fd: int, data: bytes, offset: int) -> None:
    """Writes all of the data, in as many calls as the system takes for it."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
