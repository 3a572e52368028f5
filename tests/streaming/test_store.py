import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config.errors import CheckpointError, DiskError
from streaming.files.floats import Bytes
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.layer import Lease
from streaming.statistics import IN_MEMORY, as_cells
from streaming.store import ExpertStore
from tests.streaming.expert_files import Kinds, as_float32, separate, stacked, write_safetensors
from tests.streaming.faulty_disk import FaultyDisk
from tests.waiting import wait_until

NUM_EXPERTS = 10
MXFP4: Kinds = {"weight": ("U32", (32, 8)), "scales": ("U8", (32, 2))}
PLAIN: Kinds = {"weight": ("BF16", (8, 24))}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ExpertIndex:
    """Layer 1 stacked and quantised, 2 separate, 3 mxfp4, 4 separate and unquantised."""
    directory = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    write_safetensors(directory / "model-1.safetensors", stacked(rng, [1], NUM_EXPERTS))
    write_safetensors(directory / "model-2.safetensors", separate(rng, [2], NUM_EXPERTS))
    write_safetensors(directory / "model-3.safetensors", stacked(rng, [3], NUM_EXPERTS, MXFP4))
    write_safetensors(directory / "model-4.safetensors", separate(rng, [4], NUM_EXPERTS, PLAIN))
    return ExpertIndex.from_entries(read_headers(directory))


@contextmanager
def opened(
    index: ExpertIndex,
    num_slots: int,
    *,
    float_dtype: mx.Dtype = mx.float32,
    disk: FaultyDisk | None = None,
    timeout_s: float = 30.0,
    shares_memory: bool | None = None,
) -> Iterator[ExpertStore]:
    store = ExpertStore(
        index,
        num_slots,
        float_dtype=float_dtype,
        disk=disk,
        timeout_s=timeout_s,
        shares_memory=shares_memory,
        num_threads=3,
    )
    try:
        yield store
    finally:
        store.close()


def raw_parts(index: ExpertIndex, layer: int, expert: int) -> dict[str, tuple[str, bytes]]:
    return {
        piece.part.name: (piece.part.dtype, piece.path.read_bytes()[piece.offset :][: piece.part.nbytes])
        for piece in index.pieces(layer, expert)
    }


def in_slot(store: ExpertStore, layer: int, slot: int) -> dict[str, npt.NDArray[np.generic]]:
    """What MLX computes with, floats as float32."""
    rows = {name: array[slot] for name, array in store.bank(layer).items()}
    return {
        name: np.array(row.astype(mx.float32) if mx.issubdtype(row.dtype, mx.floating) else row).reshape(-1)
        for name, row in rows.items()
    }


def assert_holds(index: ExpertIndex, store: ExpertStore, layer: int, slot: int, expert: int) -> None:
    found = in_slot(store, layer, slot)
    expected = raw_parts(index, layer, expert)
    assert found.keys() == expected.keys()
    for name, (dtype, data) in expected.items():
        if dtype in ("U32", "U8"):
            assert found[name].tobytes() == data
        else:
            np.testing.assert_array_equal(found[name], as_float32(data, dtype))


class Model:
    """Least recently used, said as plainly as possible; of one request what was read is the most recent."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.order: list[int] = []

    def acquire(self, experts: Sequence[int]) -> int:
        hit = [expert for expert in experts if expert in self.order]
        missed = [expert for expert in experts if expert not in self.order]
        others = [expert for expert in self.order if expert not in experts]
        room = self.num_slots - len(experts)
        self.order = (others[-room:] if room else []) + hit + missed
        return len(missed)


requests = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 4]), st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=12)
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    num_slots=st.sampled_from([1, 2, 3, 5, NUM_EXPERTS]),
    float_dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    shares_memory=st.booleans(),
)
@example([(2, [1]), (2, [0, 1]), (2, [2]), (2, [0])], 2, mx.float32, True)
def test_acquired_slots_hold_the_bytes_of_the_file(
    index: ExpertIndex,
    requests: list[tuple[int, list[int]]],
    num_slots: int,
    float_dtype: mx.Dtype,
    shares_memory: bool,
) -> None:
    models = {layer: Model(num_slots) for layer in index.layers}
    misses = payload = 0
    with opened(index, num_slots, float_dtype=float_dtype, shares_memory=shares_memory) as store:
        for layer, routed in requests:
            experts = sorted(set(routed))[:num_slots]
            slots = store.acquire(layer, experts)
            assert len(set(slots.tolist())) == len(experts)
            for slot, expert in zip(slots.tolist(), experts, strict=True):
                assert_holds(index, store, layer, slot, expert)
            missed = models[layer].acquire(experts)
            misses += missed
            payload += missed * index.expert_bytes(layer)
            store.check_integrity()
        statistics = store.statistics()
    assert statistics.misses == misses
    assert statistics.payload_bytes == payload


def test_everything_resident_is_read_once(index: ExpertIndex) -> None:
    with opened(index, NUM_EXPERTS) as store:
        for _ in range(3):
            store.acquire(1, range(NUM_EXPERTS))
        statistics = store.statistics()
    assert (statistics.hits, statistics.misses, statistics.evictions) == (20, 10, 0)


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_resident_store_keeps_each_expert_in_the_slot_of_its_number(
    index: ExpertIndex, shares_memory: bool
) -> None:
    with opened(index, NUM_EXPERTS, shares_memory=shares_memory) as store:
        assert not store.is_resident
        seen: list[tuple[int, int]] = []
        store.load_all(lambda done, total: seen.append((done, total)))
        assert store.is_resident
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        for layer in index.layers:
            for expert in range(NUM_EXPERTS):
                assert_holds(index, store, layer, expert, expert)


@pytest.mark.parametrize("shares_memory", [True, False])
def test_the_bank_handed_out_early_shows_what_came_later(index: ExpertIndex, shares_memory: bool) -> None:
    with opened(index, 3, float_dtype=mx.bfloat16, shares_memory=shares_memory) as store:
        bank = store.bank(4)
        (slot,) = store.acquire(4, [7])
        dtype, data = raw_parts(index, 4, 7)["up_proj.weight"]
        np.testing.assert_array_equal(
            np.array(bank["up_proj.weight"][int(slot)].astype(mx.float32)).reshape(-1),
            as_float32(data, dtype),
        )


def test_half_precision_on_disk_is_rounded_to_the_arithmetic_of_the_bank(tmp_path: Path) -> None:
    kinds: Kinds = {"weight": ("F32", (4, 8))}
    write_safetensors(tmp_path / "model.safetensors", separate(np.random.default_rng(1), [0], 2, kinds))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    with opened(index, 2, float_dtype=mx.bfloat16) as store:
        (slot,) = store.acquire(0, [1])
        dtype, data = raw_parts(index, 0, 1)["gate_proj.weight"]
        rounded = mx.array(as_float32(data, dtype)).astype(mx.bfloat16).astype(mx.float32)
        np.testing.assert_array_equal(in_slot(store, 0, int(slot))["gate_proj.weight"], np.array(rounded))


def test_an_io_error_names_file_and_expert_and_the_next_request_tries_again(index: ExpertIndex) -> None:
    disk = FaultyDisk()
    with opened(index, 4, disk=disk) as store:
        store.acquire(1, [0, 1, 2, 3])
        disk.fault = lambda number, buffer, offset: raise_(OSError(5, "Input/output error"))
        with pytest.raises(DiskError, match=r"layer 1, expert [45]: .*model-1.*Input/output error"):
            store.acquire(1, [3, 4, 5])
        store.check_integrity()
        disk.fault = None
        slots = store.acquire(1, [3, 4, 5])
        store.check_integrity()
        for slot, expert in zip(slots.tolist(), [3, 4, 5], strict=True):
            assert_holds(index, store, 1, slot, expert)


def test_one_bad_expert_harms_no_other(index: ExpertIndex) -> None:
    (bad,) = (piece.offset for piece in index.pieces(2, 4) if piece.part.name == "down_proj.biases")
    disk = FaultyDisk(
        lambda number, buffer, offset: (
            raise_(OSError(5, "Input/output error")) if offset <= bad < offset + len(buffer) else None
        )
    )
    with opened(index, 4, disk=disk) as store:
        with pytest.raises(DiskError, match="layer 2, expert 4"):
            store.acquire(2, [4])
        assert_holds(index, store, 2, int(store.acquire(2, [8])[0]), 8)
        store.check_integrity()


def test_short_reads_are_continued(index: ExpertIndex) -> None:
    def short(number: int, buffer: Bytes, offset: int) -> int | None:
        if number % 2 and len(buffer) > 512:
            path = index.pieces(1, 0)[0].path
            data = np.frombuffer(path.read_bytes()[offset : offset + 700], np.uint8)
            buffer[: len(data)] = data
            return len(data)
        return None

    with opened(index, 4, disk=FaultyDisk(short)) as store:
        for expert in range(8):
            assert_holds(index, store, 1, int(store.acquire(1, [expert])[0]), expert)


def test_interrupted_reads_are_repeated(index: ExpertIndex) -> None:
    disk = FaultyDisk(lambda number, buffer, offset: raise_(InterruptedError()) if number % 2 else None)
    with opened(index, 4, disk=disk) as store:
        assert_holds(index, store, 3, int(store.acquire(3, [6])[0]), 6)


def test_a_read_that_ends_early_is_an_error(index: ExpertIndex) -> None:
    with (
        opened(index, 4, disk=FaultyDisk(lambda number, buffer, offset: 0)) as store,
        pytest.raises(DiskError, match=r"ends .* bytes early"),
    ):
        store.acquire(1, [0])


def test_a_late_read_never_lands_in_the_slot_of_another_expert(index: ExpertIndex) -> None:
    release, returned = threading.Event(), threading.Event()

    def hang_first(number: int, buffer: Bytes, offset: int) -> int | None:
        if number == 1:
            release.wait()
            buffer[:] = 0xAB
            threading.Timer(0.05, returned.set).start()
            return len(buffer)
        return None

    with opened(index, 1, disk=FaultyDisk(hang_first), timeout_s=0.1) as store:
        with pytest.raises(DiskError, match=r"no answer in 0\.1 s"):
            store.acquire(1, [0])
        store.check_integrity()
        slot = int(store.acquire(1, [7])[0])
        release.set()
        assert returned.wait(5)
        assert_holds(index, store, 1, slot, 7)
        store.check_integrity()
        assert_holds(index, store, 1, int(store.acquire(1, [0])[0]), 0)
        assert store.statistics().num_timeouts == 1


def test_a_disk_that_died_is_refused_in_bounded_time_and_recovers(index: ExpertIndex) -> None:
    release = threading.Event()

    def hang(number: int, buffer: Bytes, offset: int) -> int | None:
        release.wait()
        return None

    disk = FaultyDisk(hang)
    with opened(index, 4, disk=disk, timeout_s=0.05) as store:
        before = threading.active_count()
        for _ in range(6):
            with pytest.raises(DiskError):
                store.acquire(1, [0, 1, 2])
            store.check_integrity()
        assert threading.active_count() <= before + 3
        release.set()
        disk.fault = None
        wait_until(lambda: threading.active_count() <= before)
        for slot, expert in zip(store.acquire(1, [0, 1, 2]).tolist(), [0, 1, 2], strict=True):
            assert_holds(index, store, 1, slot, expert)


def test_a_file_replaced_before_start_up_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, stacked(np.random.default_rng(0), [0], 2))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    write_safetensors(tmp_path / "other", stacked(np.random.default_rng(1), [0], 2))
    (tmp_path / "other").replace(path)
    with pytest.raises(CheckpointError, match="was replaced or changed"), opened(index, 2):
        pass


def test_a_file_changed_while_running_is_an_error_not_a_wrong_answer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, stacked(np.random.default_rng(0), [0], 4))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    with opened(index, 2) as store:
        store.acquire(0, [0])
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        with pytest.raises(DiskError, match="was replaced or changed"):
            store.acquire(0, [1])
        with open(path, "r+b") as file:
            file.truncate(100)
        with pytest.raises(DiskError, match=r"model\.safetensors"):
            store.acquire(0, [2])
        store.check_integrity()


def test_a_file_that_cannot_be_opened_stops_the_start_up(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", stacked(np.random.default_rng(0), [0], 2))
    index = ExpertIndex.from_entries(read_headers(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"), opened(index, 2):
        pass


def test_device_bytes_are_counted_with_their_alignment(index: ExpertIndex) -> None:
    with opened(index, 4) as store:
        store.acquire(2, [5])
        statistics = store.statistics()
    assert statistics.num_reads == 1, "the pieces of a separate expert lie side by side and are one read"
    assert statistics.payload_bytes <= statistics.device_bytes <= statistics.payload_bytes + 2 * 4096


def raise_(error: Exception) -> None:
    raise error


def test_reads_that_go_on_count_as_time_already(index: ExpertIndex) -> None:
    started, release = threading.Event(), threading.Event()

    def wait(number: int, buffer: Bytes, offset: int) -> int | None:
        started.set()
        release.wait()
        return None

    with opened(index, 4, disk=FaultyDisk(wait)) as store:
        fetch = store.begin(2, [1])
        assert started.wait(5)
        first, second = store.statistics().read_s, store.statistics().read_s
        assert 0 < first < second
        release.set()
        store.finish(fetch)


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.acquire(1, [5]),
        lambda store: store.begin(1, [5]),
        lambda store: store.expect(1, [[5]]),
        lambda store: store.resize(1, 2),
        lambda store: next(iter(store.take_turns(1, range(NUM_EXPERTS)))),
        lambda store: next(iter(store.sweep(1, {5: 1}, 1))),
    ],
    ids=["acquire", "begin", "expect", "resize", "turns", "sweep"],
)
def test_no_expert_moves_while_a_product_reads_the_layers_slots(
    index: ExpertIndex, ask: Callable[[ExpertStore], object]
) -> None:
    with opened(index, 4) as store:
        slots = store.acquire(1, [0, 1, 2, 3])
        expected = in_slot(store, 1, int(slots[0]))
        product = store.lease(1).hold(store.bank(1)["gate_proj.scales"].sum())
        with pytest.raises(AssertionError, match="not evaluated yet"):
            ask(store)
        assert all((in_slot(store, 1, int(slots[0]))[name] == rows).all() for name, rows in expected.items())
        store.acquire(2, [5])  # other layers have leases of their own
        Lease.release([store.lease(1)])
        assert store.lease(1).is_released
        mx.eval(product)
        store.acquire(1, [5])


def test_the_heat_tells_of_each_expert_whether_it_is_there_and_how_often_it_was_asked_for(
    index: ExpertIndex,
) -> None:
    with opened(index, 4) as store:
        for experts in ([1, 2], [1, 5], [1, 6], [7, 8]):
            store.acquire(1, experts)
        hits, misses, cells = store.heat()[1]
        assert (hits, misses) == (2, 6)
        assert {expert for expert, cell in enumerate(cells) if cell & IN_MEMORY} == {1, 6, 7, 8}
        assert [cell % IN_MEMORY for cell in cells] == [0, 8, 4, 0, 0, 4, 4, 4, 4, 0]
        assert store.heat()[2] == (0, 0, bytes(NUM_EXPERTS))
        assert as_cells(2, {0: 10**12}, ()) == bytes([127, 0]), "it never spills into the bit of memory"
