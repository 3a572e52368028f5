"""Experts divided among the ranks of a cluster compute what one machine computes, and each reads its own."""

import errno
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ClusterError, DiskError
from models.arithmetic import CPU, Arithmetic
from models.experts.divided_experts import DividedExperts
from models.experts.exchange import SUMMED_ROWS, Exchange, exchange_bytes
from models.experts.experts import Experts
from models.loading.building import bank_quantizations
from streaming.disk.disk import Disk
from streaming.files.floats import Bytes
from streaming.placement import Placement
from streaming.store import ExpertStore
from tests.checkpoints import Opened, open_model, save_packed
from tests.memory import start_measuring
from tests.models.experts.ranks import Meeting
from tests.models.make_golden import SEED
from tests.streaming.faulty_disk import FaultyDisk
from tests.tiny_glm import WIDER, make_weights

LAYER, EXPERTS, TOP_K, WIDTH = 5, 16, 4, 128
PACKED_ONLY = Arithmetic("packed", mx.float32, max_packed_rows=None, min_pairs=8)
Routing = Sequence[set[int]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("dense")
    opened = open_model(save_packed(folder, WIDER, make_weights(WIDER, SEED), lambda path: None))
    yield opened
    opened.store.close()


class Machine:
    """One rank with a store of its own experts, and the rows that all ranks have."""

    def __init__(
        self, whole: Opened, placement: Placement, slots: int | None, disk: Disk | None = None
    ) -> None:
        self.index = whole.checkpoint.experts.part(placement.owned)
        self.store = ExpertStore(
            self.index, EXPERTS if slots is None else slots, float_dtype=mx.float32, disk=disk
        )
        if slots is None:
            self.store.load_all()
        self._whole, self._placement = whole, placement

    def experts(self, meeting: Meeting, arithmetic: Arithmetic = CPU) -> DividedExperts:
        exchange = Exchange(self._placement, meeting.gather(self._placement.rank))
        packing = bank_quantizations(self.store.bank(LAYER), self._whole.checkpoint.args)
        return DividedExperts(LAYER, self.store, packing, arithmetic, exchange)

    @property
    def num_read(self) -> float:
        return self.store.statistics().payload_bytes / self.index.expert_bytes(LAYER)


def rows_of(routing: Routing, seed: int) -> tuple[mx.array, mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((len(routing), WIDTH)).astype(np.float32))
    ids = mx.array([sorted(row) for row in routing], dtype=mx.int32)
    weights = mx.array(rng.random(ids.shape).astype(np.float32))
    mx.eval(x, ids, weights)
    return x, ids, weights


def on_one(whole: Opened, routing: Routing, seed: int, arithmetic: Arithmetic = CPU) -> np.ndarray:
    packing = bank_quantizations(whole.store.bank(LAYER), whole.checkpoint.args)
    return np.array(Experts(LAYER, whole.store, packing, arithmetic)(*rows_of(routing, seed)))


def placements(owners: Sequence[int]) -> list[Placement]:
    num_ranks = max(owners) + 1
    return [Placement(rank, num_ranks, tuple(owners)) for rank in range(num_ranks)]


@st.composite
def owners(draw: st.DrawFn) -> list[int]:
    """Any placement in which each of two to four ranks owns something."""
    num_ranks = draw(st.integers(2, 4))
    others = draw(st.lists(st.integers(0, num_ranks - 1), min_size=EXPERTS, max_size=EXPERTS))
    return draw(st.permutations([*range(num_ranks), *others[num_ranks:]]))


@pytest.mark.parametrize("arithmetic", [CPU, PACKED_ONLY], ids=lambda a: a.name)
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 15), min_size=TOP_K, max_size=TOP_K), min_size=1, max_size=40),
    owners(),
    st.sampled_from([4, 7, None]),
    st.integers(0, 2**32 - 1),
)
def test_any_placement_gives_the_bits_of_one_machine_and_reads_each_expert_on_one(
    whole: Opened,
    arithmetic: Arithmetic,
    routing: Routing,
    owners: Sequence[int],
    slots: int | None,
    seed: int,
) -> None:
    expected = on_one(whole, routing, seed, arithmetic)
    machines = [Machine(whole, placement, slots) for placement in placements(owners)]
    meeting = Meeting(len(machines))
    wanted = set().union(*routing)

    def work(rank: int) -> tuple[np.ndarray, float]:
        before = machines[rank].num_read
        out = np.array(machines[rank].experts(meeting, arithmetic)(*rows_of(routing, seed)))
        machines[rank].store.check_integrity()
        return out, machines[rank].num_read - before

    try:
        for rank, (out, num_read) in enumerate(meeting.run(work)):
            if arithmetic.gathers(len(routing)):
                assert np.array_equal(out, expected)
            assert np.abs(out - expected).max() < 1e-5
            own = sum(owners[expert] == rank for expert in wanted)
            assert num_read == (0 if slots is None else own)
    finally:
        for machine in machines:
            machine.store.close()


@pytest.mark.parametrize("num_rows", [3, 30])
def test_ranks_that_want_different_experts_say_so(whole: Opened, num_rows: int) -> None:
    machines = [Machine(whole, placement, None) for placement in placements([0, 1] * 8)]
    meeting = Meeting(2)

    def work(rank: int) -> str:
        routing = [{0, 2, 4, 6}] * (num_rows - 1) + [{0, 2, 4, 6 + rank}]
        with pytest.raises(ClusterError) as error:
            machines[rank].experts(meeting)(*rows_of(routing, 1))
        return str(error.value)

    words = "want different experts for the same rows"
    assert any(words in message for message in meeting.run(work))
    for machine in machines:
        machine.store.close()


@pytest.mark.parametrize("num_rows", [3, 30])
def test_a_rank_that_cannot_read_fails_the_step_on_all_and_only_that_step(
    whole: Opened, num_rows: int
) -> None:
    def broken(number: int, buffer: Bytes, offset: int) -> int | None:
        raise OSError(errno.EIO, "Input/output error")

    disk = FaultyDisk(broken)
    first, second = placements([0, 1] * 8)
    machines, meeting = [Machine(whole, first, 6), Machine(whole, second, 6, disk)], Meeting(2)
    routing = [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}] * (num_rows // 3)

    def work(rank: int) -> tuple[str, np.ndarray]:
        experts, message = machines[rank].experts(meeting), ""
        try:
            experts(*rows_of(routing, 1))
        except DiskError as error:
            message = str(error)
        disk.fault = None
        return message, np.array(experts(*rows_of(routing, 1)))

    (heard, out), (own, _) = meeting.run(work)
    assert heard == f"layer {LAYER}: rank 1 of the cluster could not read its experts"
    assert "Input/output error" in own
    assert np.abs(out - on_one(whole, routing, 1)).max() < 1e-5
    for machine in machines:
        machine.store.check_integrity()
        machine.store.close()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_a_message_takes_is_in_the_plan(num_ranks: int) -> None:
    width, rows = 512, 4 * SUMMED_ROWS
    placement = Placement.by_id(0, num_ranks, EXPERTS)
    exchange = Exchange(placement, lambda words: mx.concatenate([words[None]] * num_ranks))
    own = mx.ones((rows, width))
    mx.eval(own)
    before = start_measuring()
    summed = exchange.seal(LAYER, np.zeros((rows, TOP_K), np.int32)).sums(own, None)
    peak = mx.get_peak_memory() - before
    assert (np.array(summed) == num_ranks).all()
    assert 0.6 * exchange_bytes(num_ranks, width) < peak <= exchange_bytes(num_ranks, width)


def test_a_guess_is_read_only_by_the_owner(whole: Opened) -> None:
    machines = [Machine(whole, placement, 6) for placement in placements([0, 1] * 8)]
    meeting = Meeting(2)
    for rank, machine in enumerate(machines):
        machine.experts(meeting).anticipate(mx.array([[3, 8, 5, 2]]))
        assert set(machine.store._layers[LAYER].ahead) <= {e for e in (3, 8, 5, 2) if e % 2 == rank}
        assert machine.store.statistics().ahead_started > 0
        machine.store.close()
