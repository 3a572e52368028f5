"""One layer's slots: for each part an MLX array `[slots, ...]`, filled in place.

Owns the arrays. The store's thread makes them, `begin`s and `finish`es a fill; in between the reader's
threads `write` bytes. Two kinds, chosen by `shares_memory` and nowhere else: where MLX computes in memory
that the CPU can write, bytes go straight in through a NumPy view; on a discrete GPU they are staged and
copied, because a write through a view would make the whole bank travel (measured: 9 ms for 16 MiB
on an H100).
"""

import mmap
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from streaming.device_copy import HostRows, fill_slots
from streaming.disk.reads import Target
from streaming.files.floats import CARRIERS, FLOATS, MLX_TYPES, Bytes, commit
from streaming.files.headers import ITEM_BYTES
from streaming.files.index import Part

# Experts that are staged together; bounds the staging memory.
STAGED_ROWS = 16

_MLX_CARRIERS = MLX_TYPES | {"BF16": mx.uint16}
_FLOAT_NAMES = {MLX_TYPES[name]: name for name in FLOATS}


class Bank(Protocol):
    """One layer's slots. `arrays` maps part names to the live arrays."""

    arrays: Mapping[str, mx.array]
    max_fill: int
    is_in_place: bool  # slots are filled one by one, while products read others

    def begin(self, slots: Sequence[int]) -> None:
        """Prepares to fill these slots, at most `max_fill`."""
        ...

    def target(self, slot: int, part: int, start: int, nbytes: int, at: int) -> Target | None:
        """Memory for file bytes of the numbered part, from byte `start` of it on, that are kept as they are.

        They are bytes `at` and following of a read. None: give them to `write`.
        """
        ...

    def write(self, slot: int, part: int, start: int, raw: Bytes) -> None:
        """Writes file bytes of the numbered part, from byte `start` of it on, as the bank keeps them."""
        ...

    def finish(self, slots: Sequence[int]) -> None:
        """Makes what was written to these slots visible in `arrays`."""
        ...

    def copy(self, slot: int, source: Any, source_slot: int) -> None:
        """Copies an expert out of a slot of another bank of the same kind and parts."""
        ...

    def resize(self, kept: Sequence[int], num_slots: int) -> None:
        """Makes new arrays of `num_slots` slots; slot i holds what slot `kept[i]` held, the rest anything.

        While it runs both are in memory. An error, of memory that is not there, leaves the bank as it was.
        """
        ...


class BankMaker:
    """Makes the banks of one store, all of the same kind."""

    def __init__(self, float_dtype: mx.Dtype, *, is_shared: bool | None = None) -> None:
        self._float_name = _FLOAT_NAMES[float_dtype]
        self.is_shared = shares_memory() if is_shared is None else is_shared
        self._staging: dict[tuple[Part, ...], list[HostRows]] = {}

    def make(self, parts: tuple[Part, ...], num_slots: int, leads: Sequence[int] = ()) -> Bank:
        """`leads`: how far behind the start of a page each part's bytes lie on disk, if always the same."""
        kept = tuple(kept_dtype(part, self._float_name) for part in parts)
        if self.is_shared:
            return SharedBank(parts, kept, num_slots, leads or (0,) * len(parts))
        if parts not in self._staging:
            self._staging[parts] = [
                HostRows(STAGED_ROWS, part.shape, CARRIERS[name])
                for part, name in zip(parts, kept, strict=True)
            ]
        return StagedBank(parts, kept, num_slots, self._staging[parts])


def shares_memory() -> bool:
    """Whether the CPU can write into MLX's arrays without making them move."""
    return not (mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available())


def kept_dtype(part: Part, float_name: str) -> str:
    """What the bank keeps a part as: integers as they are, floats in the arithmetic's own type.

    With fp32 activations a bf16 scale would be cast on every call, for the whole bank (22 against 5.5 ms).
    """
    return float_name if part.dtype in FLOATS else part.dtype


def slot_bytes(parts: Sequence[Part], float_dtype: mx.Dtype) -> int:
    """Memory of one slot, for the plan: more than on disk where scales are widened."""
    name = _FLOAT_NAMES[float_dtype]
    return sum(prod(part.shape) * ITEM_BYTES[kept_dtype(part, name)] for part in parts)


class SharedBank:
    """Written through views that share MLX's memory, and read into straight from the disk."""

    is_in_place = True

    def __init__(
        self, parts: tuple[Part, ...], kept: tuple[str, ...], num_slots: int, leads: Sequence[int]
    ) -> None:
        self._parts = parts
        self._kept = kept
        self._leads = leads
        self._make(num_slots)

    def _make(self, num_slots: int) -> None:
        names = [part.name for part in self._parts]
        owners = [
            _zeros_at((num_slots, *part.shape), _MLX_CARRIERS[kept], lead if kept == part.dtype else 0)
            for part, kept, lead in zip(self._parts, self._kept, self._leads, strict=True)
        ]
        views = [np.array(owner, copy=False).reshape(num_slots, -1) for owner in owners]
        arrays = [_as_float(owner, kept) for owner, kept in zip(owners, self._kept, strict=True)]
        mx.eval(arrays)
        for view, array in zip(views, arrays, strict=True):
            _check_aliasing(view, array)
        self._views, self.max_fill = views, num_slots
        self._bytes = [
            view.view(np.uint8) if kept == part.dtype else None
            for view, kept, part in zip(views, self._kept, self._parts, strict=True)
        ]
        self._addresses = [view.ctypes.data for view in views]
        self.arrays: Mapping[str, mx.array] = dict(zip(names, arrays, strict=True))

    def begin(self, slots: Sequence[int]) -> None:
        pass

    def target(self, slot: int, part: int, start: int, nbytes: int, at: int) -> Target | None:
        if (rows := self._bytes[part]) is None:
            return None
        address = self._addresses[part] + slot * rows.shape[1] + start
        return Target(at, rows[slot, start : start + nbytes], address)

    def write(self, slot: int, part: int, start: int, raw: Bytes) -> None:
        _commit_row(self._views[part][slot], self._kept[part], start, raw, self._parts[part].dtype)

    def finish(self, slots: Sequence[int]) -> None:
        pass

    def copy(self, slot: int, source: "SharedBank", source_slot: int) -> None:
        for view, other in zip(self._views, source._views, strict=True):
            np.copyto(view[slot], other[source_slot])

    def resize(self, kept: Sequence[int], num_slots: int) -> None:
        before = self._views
        self._make(num_slots)
        for view, other in zip(self._views, before, strict=True):
            for slot, old_slot in enumerate(kept):
                np.copyto(view[slot], other[old_slot])


class StagedBank:
    """Written into host rows, then copied into the GPU's arrays. The rows are shared by like layers."""

    is_in_place = False

    def __init__(
        self,
        parts: tuple[Part, ...],
        kept: tuple[str, ...],
        num_slots: int,
        staging: list[HostRows],
    ) -> None:
        self.max_fill = STAGED_ROWS
        self._parts = parts
        self._kept = kept
        self._staging = staging
        self._rows: dict[int, int] = {}
        self.arrays: Mapping[str, mx.array] = {
            part.name: _as_float(mx.zeros((num_slots, *part.shape), _MLX_CARRIERS[name]), name)
            for part, name in zip(parts, kept, strict=True)
        }
        mx.eval(list(self.arrays.values()))

    def begin(self, slots: Sequence[int]) -> None:
        assert len(slots) <= self.max_fill, "more slots are filled at once than there are staging rows"
        self._rows = {slot: row for row, slot in enumerate(slots)}

    def target(self, slot: int, part: int, start: int, nbytes: int, at: int) -> Target | None:
        if self._kept[part] != self._parts[part].dtype:
            return None
        row = self._staging[part].array[self._rows[slot]].reshape(-1).view(np.uint8)
        return Target(at, row[start : start + nbytes], row.ctypes.data + start)

    def write(self, slot: int, part: int, start: int, raw: Bytes) -> None:
        row = self._staging[part].array[self._rows[slot]].reshape(-1)
        _commit_row(row, self._kept[part], start, raw, self._parts[part].dtype)

    def finish(self, slots: Sequence[int]) -> None:
        arrays = list(self.arrays.values())
        if slots and all(rows.is_pinned for rows in self._staging):
            fill_slots(arrays, self._staging, {slot: self._rows[slot] for slot in slots})
        else:
            for slot in slots:
                for array, name, staged in zip(arrays, self._kept, self._staging, strict=True):
                    # Nothing else holds the old array, so MLX writes in place and the caller sees it.
                    array[slot] = _as_float(staged.to_device(self._rows[slot]), name)
            mx.eval(arrays)
        if len(slots) < len(self._rows):  # a read that failed may yet come back, and write into its row
            self._staging[:] = [rows.anew() for rows in self._staging]

    def copy(self, slot: int, source: "StagedBank", source_slot: int) -> None:
        for name, array in self.arrays.items():
            array[slot] = source.arrays[name][source_slot]
        mx.eval(list(self.arrays.values()))

    def resize(self, kept: Sequence[int], num_slots: int) -> None:
        old_slots = mx.array([*kept, *[0] * (num_slots - len(kept))])
        arrays = {name: array[old_slots] for name, array in self.arrays.items()}
        mx.eval(list(arrays.values()))
        self.arrays = arrays


def _commit_row(row: npt.NDArray[np.generic], kept: str, start: int, raw: Bytes, dtype: str) -> None:
    first = start // ITEM_BYTES[dtype]
    commit(row[first : first + len(raw) // ITEM_BYTES[dtype]], kept, raw, dtype)


def _as_float(array: mx.array, name: str) -> mx.array:
    """A bfloat16 array kept as its bits, seen as bfloat16; shares the memory."""
    return array.view(mx.bfloat16) if name == "BF16" else array


def _zeros_at(shape: tuple[int, ...], dtype: mx.Dtype, lead: int) -> mx.array:
    """Zeros that start `lead` bytes behind the start of a page; a view of an array that is a page longer.

    Bytes that lie so on disk too can be read without a copy. Where they are copied, it is from the start of a
    page or `lead` behind one; MLX's own arrays start 24 bytes into one, and a copy from the start of a page
    to 1 to 63 bytes into another takes four times as long on Zen 3 (`rep movsb`; 177 against 44 microseconds
    for 320 KiB).
    """
    size = prod(shape)
    longer = mx.zeros(size + mmap.PAGESIZE // dtype.size, dtype)
    mx.eval(longer)
    first = (lead - np.array(longer, copy=False).ctypes.data) % mmap.PAGESIZE // dtype.size
    zeros = longer[first : first + size].reshape(shape)
    mx.eval(zeros)
    return zeros


def _check_aliasing(view: npt.NDArray[np.generic], array: mx.array) -> None:
    """A byte written through the view must be there for MLX, or every expert would be silently zero."""
    probe = view.view(np.uint8)
    probe[-1, -1] = 0x3F
    seen = array[-1].reshape(-1)[-1:].view(mx.uint8)[-1].item()
    probe[-1, -1] = 0
    assert seen == 0x3F, "MLX does not see what is written through a NumPy view of its array"
