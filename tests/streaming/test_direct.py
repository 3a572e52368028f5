"""Reads that go straight into slots: that they do, bring the right bytes, and never land in another's."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import CheckpointError, DiskError
from streaming.disk.copies import find_copies
from streaming.disk.disk import DirectDisk, Disk, DiskFile, aligned_buffer
from streaming.disk.mirror import MirroredDisk
from streaming.disk.reads import Target, scatter
from streaming.files.floats import Bytes
from streaming.files.headers import FileStamp, read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import Kinds, separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk
from tests.streaming.test_store import assert_holds
from tests.waiting import wait_until

NUM_EXPERTS = 8
# Whole blocks of 512 bytes, and of 4,096.
KINDS: Kinds = {"weight": ("U32", (64, 64)), "scales": ("BF16", (64, 32)), "biases": ("BF16", (64, 32))}


def write(folder: Path, header_bytes: int | None = None) -> ExpertIndex:
    """Layer 1 stacked, layer 2 separate; headers are so long, modulo a page."""
    rng = np.random.default_rng(0)
    for layer, tensors in (
        (1, stacked(rng, [1], NUM_EXPERTS, KINDS)),
        (2, separate(rng, [2], NUM_EXPERTS, KINDS)),
    ):
        path = folder / f"model-{layer}.safetensors"
        write_safetensors(path, tensors)
        if header_bytes is not None:
            length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            write_safetensors(path, tensors, (header_bytes - length) % 4096)
    return ExpertIndex.from_entries(read_headers(folder))


@pytest.fixture
def index(tmp_path: Path) -> ExpertIndex:
    return write(tmp_path, 8)


@contextmanager
def opened(
    index: ExpertIndex,
    num_slots: int,
    disk: Disk | None = None,
    timeout_s: float = 5,
    ring_slots: int = 4,
    shares_memory: bool = True,
) -> Iterator[ExpertStore]:
    store = ExpertStore(
        index, num_slots, float_dtype=mx.bfloat16, disk=disk, num_threads=3, timeout_s=timeout_s,
        shares_memory=shares_memory, ring_slots=ring_slots,
    )  # fmt: skip
    try:
        yield store
    finally:
        store.close()


class WatchedDisk:
    """Counts the bytes that are read straight into one of `memories`."""

    may_repeat = False

    def __init__(self) -> None:
        self.memories: list[npt.NDArray[np.uint8]] = []
        self.num_direct = self.num_bytes = 0
        self.lock = threading.Lock()

    def open(self, path: Path, stamp: FileStamp) -> DiskFile:
        return _WatchedFile(self, DirectDisk().open(path, stamp))


class _WatchedFile:
    may_repeat = False

    def __init__(self, disk: WatchedDisk, file: DiskFile) -> None:
        self.alignment = file.alignment
        self._disk, self._file = disk, file
        self.check, self.give_up, self.close = file.check, file.give_up, file.close

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> int:
        with self._disk.lock:
            for buffer in buffers:
                is_direct = any(np.may_share_memory(buffer, memory) for memory in self._disk.memories)
                self._disk.num_direct += len(buffer) * is_direct
                self._disk.num_bytes += len(buffer)
        return self._file.read_into(buffers, offset)


def memories(store: ExpertStore, layer: int) -> list[npt.NDArray[np.uint8]]:
    arrays = store.bank(layer).values()
    return [np.array(a.view(mx.uint16), copy=False).view(np.uint8).reshape(-1) for a in arrays]


def assert_hold(
    index: ExpertIndex, store: ExpertStore, slots: npt.NDArray[np.int32], experts: Sequence[int]
) -> None:
    """Each slot of layer 1 has its expert."""
    for slot, expert in zip(slots.tolist(), experts, strict=True):
        assert_holds(index, store, 1, slot, expert)


blocks = st.integers(0, 5).map(lambda n: 512 * n)


@given(
    lead=st.integers(0, 511),
    sizes=st.lists(st.tuples(st.integers(0, 700), st.one_of(blocks, st.integers(0, 3000))), max_size=4),
    shifts=st.lists(st.one_of(st.just(0), st.integers(0, 511)), min_size=4, max_size=4),
    alignment=st.sampled_from([512, None]),
)
def test_a_scattered_read_brings_each_byte_to_its_place_and_none_elsewhere(
    lead: int, sizes: list[tuple[int, int]], shifts: list[int], alignment: int | None
) -> None:
    targets, memories, at = [], [], 0
    for (gap, nbytes), shift in zip(sizes, shifts, strict=False):
        at += gap
        memory = aligned_buffer(8192)
        start = 1024 + (lead + at + shift) % 512
        targets.append(Target(at, memory[start : start + nbytes], memory.ctypes.data + start))
        memories.append((memory, start, nbytes, at, shift))
        at += nbytes
    num_bytes = -(-(lead + at) // 512) * 512
    disk = np.random.default_rng(0).integers(1, 256, num_bytes, np.uint8)
    buffer = aligned_buffer(max(num_bytes, 1))[:num_bytes]
    filled, copies, is_direct = scatter(buffer, lead, targets, alignment)
    assert sum(map(len, filled)) == num_bytes
    if alignment:
        assert all(len(part) % 512 == 0 and part.ctypes.data % 512 == 0 for part in filled)
    done = 0
    for part in filled:
        part[:] = disk[done : done + len(part)]
        done += len(part)
    for into, what in copies:
        into[:] = what
    for memory, start, nbytes, at, _ in memories:
        np.testing.assert_array_equal(memory[start : start + nbytes], disk[lead + at : lead + at + nbytes])
        assert not memory[:start].any()
        assert not memory[start + nbytes :].any()
    can_be = alignment and any(nbytes >= 1024 and shift == 0 for _, _, nbytes, _, shift in memories)
    assert is_direct == bool(can_be)


@pytest.mark.parametrize("header_bytes", [0, 8, 512, 1000, 4088])
def test_nearly_all_goes_straight_into_slots_wherever_the_header_ends(
    tmp_path: Path, header_bytes: int
) -> None:
    index, disk = write(tmp_path, header_bytes), WatchedDisk()
    with opened(index, 3, disk) as store:
        for layer in index.layers:
            disk.memories, disk.num_direct, disk.num_bytes = memories(store, layer), 0, 0
            for expert in (0, 5, 2, 7, 0):
                (slot,) = store.acquire(layer, [expert])
                assert_holds(index, store, layer, int(slot), expert)
            # Of each part the blocks at both ends are other parts' too.
            assert disk.num_direct >= 0.85 * disk.num_bytes
            if header_bytes % 512 == 0:
                assert disk.num_direct == disk.num_bytes
        store.check_integrity()


class Hang:
    """Reads of these numbers wait until they may go on; then they bring what they were asked for."""

    def __init__(self, *numbers: int) -> None:
        self._numbers, self.let_go = numbers, threading.Event()
        self.started = threading.Event()
        self.disk = FaultyDisk(self._fault)

    def _fault(self, number: int, buffer: Bytes, offset: int) -> None:
        if number in self._numbers:
            self.started.set()
            self.let_go.wait()

    def release(self, store: ExpertStore) -> None:
        """Returns once they are through."""
        self.let_go.set()
        wait_until(lambda: store._filler.num_writers() == 0)


def test_a_read_that_comes_late_finds_its_slot_empty_still(index: ExpertIndex) -> None:
    hang = Hang(1)
    with opened(index, 3, hang.disk, timeout_s=0.1) as store:
        with pytest.raises(DiskError, match=r"no answer in 0\.1 s"):
            store.acquire(1, [0])
        others = [4, 5, 6, 7, 4]
        for expert in others:
            (slot,) = store.acquire(1, [expert])
            assert_holds(index, store, 1, int(slot), expert)
        held = {expert: int(store.acquire(1, [expert])[0]) for expert in others[-2:]}
        hang.release(store)
        for expert, slot in held.items():
            assert_holds(index, store, 1, slot, expert)
        slots = store.acquire(1, [0, 1, 2])
        assert_hold(index, store, slots, (0, 1, 2))
        store.check_integrity()


def test_where_hung_reads_hold_all_slots_requests_are_told_until_they_are_back(index: ExpertIndex) -> None:
    hang = Hang(1, 2)
    with opened(index, 1, hang.disk, timeout_s=0.1) as store:
        with pytest.raises(DiskError, match="no answer"):
            store.acquire(1, [0])
        with pytest.raises(DiskError, match="layer 1: reads that the disk never answered hold its slots"):
            store.acquire(1, [3])
        with pytest.raises(DiskError, match="hold its slots"):
            list(store.take_turns(1, [3, 4]))
        assert_holds(index, store, 2, int(store.acquire(2, [3])[0]), 3)
        hang.release(store)
        assert_holds(index, store, 1, int(store.acquire(1, [3])[0]), 3)
        store.check_integrity()


def test_a_guess_that_is_not_wanted_keeps_its_slot_while_it_is_read(index: ExpertIndex) -> None:
    """Three threads are in reads of the first guess; the rest of it is dropped."""
    hang = Hang(1, 2, 3)
    with opened(index, 4, hang.disk) as store:
        store.expect(1, [[0]])
        assert hang.started.wait(5)
        store.expect(1, [[0], [1]])
        fetch = store.begin(1, [5, 6])  # drops what has not begun
        hang.release(store)
        store.finish(fetch)
        assert_hold(index, store, fetch.slots, (5, 6))
        slots = store.acquire(1, [0, 1, 2, 3])
        assert_hold(index, store, slots, (0, 1, 2, 3))
        store.check_integrity()


def test_who_needs_the_slot_of_a_guess_that_is_being_read_waits_for_it(index: ExpertIndex) -> None:
    hang = Hang(1, 2, 3)
    with opened(index, 4, hang.disk) as store:
        store.expect(1, [[0]])
        assert hang.started.wait(5)
        threading.Timer(0.1, hang.let_go.set).start()
        slots = store.acquire(1, [4, 5, 6, 7])
        assert_hold(index, store, slots, (4, 5, 6, 7))
        store.check_integrity()


def test_sweeps_pass_over_slots_of_the_ring_that_a_hung_read_holds(tmp_path: Path) -> None:
    index, hang = write(tmp_path, 0), Hang(1)
    with opened(index, 1, hang.disk, timeout_s=0.1) as store:
        with pytest.raises(DiskError, match="no answer"):
            list(store.sweep(1, dict.fromkeys(range(NUM_EXPERTS), 1), 2))
        for _ in range(2):
            seen = []
            for places in store.sweep(1, dict.fromkeys(range(NUM_EXPERTS), 1), 2):
                for place in places:
                    weight = np.array(place.arrays["up_proj.weight"][place.slot])
                    assert weight.tobytes() == raw(index, 1, place.expert)
                    seen.append(place.expert)
            assert seen == list(range(NUM_EXPERTS))
            hang.release(store)
        store.check_integrity()


def test_a_ring_that_hung_reads_hold_says_so(tmp_path: Path) -> None:
    index, hang = write(tmp_path, 0), Hang(*range(1, 40))
    with opened(index, 1, hang.disk, timeout_s=0.05, ring_slots=2) as store:
        for _ in range(4):
            with pytest.raises(DiskError):
                list(store.sweep(1, dict.fromkeys(range(NUM_EXPERTS), 1), 1))
        hang.release(store)


def test_behind_a_mirror_nothing_goes_straight_into_a_slot(tmp_path: Path) -> None:
    """A read that hangs is repeated on the other side, and may come back when its slot is another's."""
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        index = write(tmp_path / name, 8)
    first, second = WatchedDisk(), WatchedDisk()
    mirror = find_copies(tmp_path / "a", tmp_path / "b", index.stamps)
    disk = MirroredDisk(tmp_path / "a", [mirror], [first, second])
    with opened(index, 3, disk) as store:
        first.memories = second.memories = memories(store, 1)
        for expert in (0, 5, 2, 7):
            assert_holds(index, store, 1, int(store.acquire(1, [expert])[0]), expert)
        assert first.num_bytes + second.num_bytes > 0
        assert first.num_direct + second.num_direct == 0


def test_a_guess_out_of_a_file_that_was_changed_is_not_used(index: ExpertIndex, tmp_path: Path) -> None:
    with opened(index, 4) as store:
        store.acquire(1, [0])
        with open(tmp_path / "model-1.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
        store.expect(1, [[3]])
        wait_until(lambda: all(fill.is_settled for fill in store._layers[1].ahead.values()))
        with pytest.raises(DiskError, match="was replaced or changed"):
            store.acquire(1, [3])


def test_a_file_that_may_not_be_read_stops_the_start_up(
    index: ExpertIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's refusal is injected."""

    def refuse(path: Path, *args: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: Permission denied"), opened(index, 2):
        pass


def raw(index: ExpertIndex, layer: int, expert: int, name: str = "up_proj.weight") -> bytes:
    (piece,) = (piece for piece in index.pieces(layer, expert) if piece.part.name == name)
    return piece.path.read_bytes()[piece.offset :][: piece.part.nbytes]
