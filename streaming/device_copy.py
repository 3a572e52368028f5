"""A host row's way into a discrete GPU's memory. Called by the banks, on the store's thread.

Rows in pinned memory are read by a kernel over the bus, 40 GB/s on an H200, and one kernel brings all parts
of several experts. Where memory cannot be pinned, `mx.load`, which reads from anything that behaves like a
file, makes the driver copy them, 4 to 5 GB/s; `mx.array` makes managed memory, whose pages a GPU fetches one
fault at a time, 2 GB/s.
"""

import ctypes
import io
import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Of the CUDA runtime that MLX has loaded; each lies in the process under its own name only.
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
_PORTABLE_AND_MAPPED = 3
_WORD_BYTES = 16
# A bank is an input of the kernel that fills it: MLX has no kernels that write into what is there. Nothing
# reads a bank while it is filled, and the kernel is waited for.
_FILL = r"""
  const unsigned long long* mine = plan + blockIdx.y * (PARTS + 1);
  const long me = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  const long all = static_cast<long>(gridDim.x) * blockDim.x, slot = mine[0];
  COPIES
  if (me == 0) out[blockIdx.y] = 1;
"""
_COPY = r"""
  {
    const uint4* from = reinterpret_cast<const uint4*>(mine[PART + 1]);
    uint4* to = (uint4*)(bankPART) + slot * WORDSPART;
    for (long i = me; i < WORDSPART; i += all) to[i] = from[i];
  }
"""
_THREADS, _BLOCKS = 512, 32


class HostRows:
    """Rows of one shape in host memory, zeros at first, that a GPU can take one by one."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        row_bytes = prod(shape) * np.dtype(dtype).itemsize
        memory = np.frombuffer(mmap.mmap(-1, max(1, num_rows * row_bytes)), np.uint8)
        self._is_pinned = row_bytes % _WORD_BYTES == 0 and _pin(memory)
        self.array = memory[: num_rows * row_bytes].view(dtype).reshape(num_rows, *shape)

    @property
    def is_pinned(self) -> bool:
        """Whether `fill_slots` can take rows from here."""
        return self._is_pinned

    def anew(self) -> "HostRows":
        """Rows like these in other memory; these live on while anybody holds one."""
        return HostRows(len(self.array), self.array.shape[1:], self.array.dtype)

    def to_device(self, row: int) -> mx.array:
        """The numbered row as an MLX array, lazy: its memory is read when the array is evaluated."""
        return copy_to_device(self.array[row])


def fill_slots(banks: Sequence[mx.array], staged: Sequence[HostRows], row_of: Mapping[int, int]) -> None:
    """Copies rows of pinned memory into slots of the banks, part by part: `row_of` maps slots to rows.

    Banks [slots, ...] and rows have the same sizes. Returns once the bytes are there.
    """
    starts = [(rows.array.ctypes.data, rows.array[0].nbytes) for rows in staged]
    plan = [[slot, *(start + row * nbytes for start, nbytes in starts)] for slot, row in row_of.items()]
    [done] = _fill_kernel(len(banks))(
        inputs=[mx.array(np.array(plan, np.uint64)), *banks],
        template=[(f"WORDS{i}", nbytes // _WORD_BYTES) for i, (_, nbytes) in enumerate(starts)],
        grid=(_BLOCKS * _THREADS, len(plan), 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(len(plan),)],
        output_dtypes=[mx.int32],
    )
    mx.eval(done)


@cache
def _fill_kernel(num_parts: int) -> Callable[..., list[mx.array]]:
    names = [f"bank{i}" for i in range(num_parts)]
    copies = "".join(_COPY.replace("PART", str(i)) for i in range(num_parts))
    source = _FILL.replace("COPIES", copies).replace("PARTS", str(num_parts))
    return cast(
        Callable[..., list[mx.array]], mx.fast.cuda_kernel("fill_slots", ["plan", *names], ["out"], source)
    )


def _pin(memory: npt.NDArray[np.uint8]) -> bool:
    """Makes the GPU see the memory where it lies, for as long as the array lives; False where it cannot."""
    runtime, address = _cuda_runtime(), ctypes.c_void_p(memory.ctypes.data)
    if runtime is None:
        return False
    if runtime.cudaHostRegister(address, ctypes.c_size_t(memory.nbytes), _PORTABLE_AND_MAPPED):
        runtime.cudaGetLastError()  # or MLX would take it for its own
        return False
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return True


@cache
def _cuda_runtime() -> ctypes.CDLL | None:
    """The runtime in this process, where MLX computes with CUDA."""
    if not mx.cuda.is_available() or mx.default_device().type == mx.DeviceType.cpu:
        return None
    for name in _RUNTIMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


class _RowFile(io.RawIOBase):
    """A row as a file in NumPy's format: its header, then the row's own memory."""

    def __init__(self, row: npt.NDArray[np.generic]) -> None:
        self._header = np.frombuffer(_header(row.dtype.str, row.shape), np.uint8)
        self._body = row.reshape(-1).view(np.uint8)
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._header.size + self._body.size}
        self._at = start[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer, which begins and ends within the header or within the row, as MLX reads."""
        target = np.frombuffer(buffer, np.uint8)
        source, at = (self._header, self._at)
        if at >= self._header.size:
            source, at = self._body, at - self._header.size
        found = source[at : at + target.size]
        np.copyto(target[: found.size], found)
        self._at += found.size
        return int(found.size)


def copy_to_device(row: npt.NDArray[np.generic]) -> mx.array:
    """The row as an MLX array, lazy: its memory is read when the array is evaluated. C order."""
    loaded = mx.load(_RowFile(row), format="npy")  # type: ignore[arg-type]
    assert isinstance(loaded, mx.array), "a file in NumPy's format holds one array"
    return loaded


@cache
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()
