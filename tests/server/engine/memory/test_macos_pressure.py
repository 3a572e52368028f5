"""The governor under the warnings of a simulated macOS kernel, at GLM-5.2's size."""

import pytest

from benchmarks.rig.macos_memory import GB, SLOTS, WHOLE, CountedBanks, Mac, govern, run
from server.engine.memory.governor import SETTLE_S
from tests.grids import few


@pytest.mark.parametrize("lag_s", few([0.0, 3.0, 7.0], [3.0]))
@pytest.mark.parametrize("compressed_gb", few([14.2, 15, 16, 18, 20, 25], [14.2, 20]))
def test_a_warning_costs_one_release_and_no_more_is_copied_than_twice_what_had_to_go(
    compressed_gb: float, lag_s: float
) -> None:
    mac = Mac(CountedBanks(), compressed_bytes=int(compressed_gb * GB), lag_s=lag_s)
    governor = govern(mac)
    had_to_go = 1.5 * mac.compressed_bytes - mac.uncompressed_bytes
    run(mac, governor, 3600)
    assert mac.num_warnings == 1
    assert not mac.is_warned
    assert governor.measure()["shrinks"] == 1
    assert mac.banks.copied_bytes <= 2 * had_to_go
    assert WHOLE - mac.banks.slot_bytes <= had_to_go + 2 * GB, "no more than a margin on top"
    assert min(mac.banks.slots.values()) >= SLOTS // 2 if had_to_go < 0.4 * WHOLE else True


@pytest.mark.parametrize("compressed_gb", [14.2, 16, 20])
def test_banks_grow_back_once_the_neighbour_is_gone_and_into_no_next_warning(compressed_gb: float) -> None:
    mac = Mac(CountedBanks(), compressed_bytes=int(compressed_gb * GB))
    governor = govern(mac)
    run(mac, governor, 300)
    gone = WHOLE - mac.banks.slot_bytes
    copied = mac.banks.copied_bytes
    mac.compressed_bytes = 2 * GB
    run(mac, governor, 1800)
    assert mac.banks.slot_bytes == WHOLE
    assert mac.num_warnings == 1
    assert mac.banks.copied_bytes - copied <= 2 * gone


def test_a_neighbour_that_half_goes_gets_half_of_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mac = Mac(CountedBanks(), compressed_bytes=20 * GB)
    governor = govern(mac)
    run(mac, governor, 300)
    low = mac.banks.slot_bytes
    mac.compressed_bytes = 14 * GB
    run(mac, governor, 3600)
    assert low < mac.banks.slot_bytes < WHOLE
    assert mac.num_warnings == 1
    assert mac.uncompressed_bytes > 1.5 * mac.compressed_bytes


@pytest.mark.parametrize("period_s", few([60, 300, 700], [300]))
def test_a_neighbour_that_comes_and_goes_does_not_drive_the_banks_up_and_down(period_s: int) -> None:
    mac = Mac(CountedBanks())
    governor = govern(mac)
    for round_ in range(3600 // period_s):
        mac.compressed_bytes = (15 if round_ % 2 else 3) * GB
        run(mac, governor, period_s)
    assert mac.banks.copied_bytes <= 3600 // period_s * 20 * GB
    assert mac.num_warnings <= 3600 // period_s // 2 + 1


def test_a_step_moves_one_bank_only() -> None:
    mac = Mac(CountedBanks(), compressed_bytes=20 * GB)
    governor = govern(mac)
    for _ in range(60):
        mac.pass_second()
        before = dict(mac.banks.slots)
        assert not governor.govern(), "the next step comes first"
        assert sum(before[layer] != slots for layer, slots in mac.banks.slots.items()) <= 1
    assert SETTLE_S >= 5
