"""What macOS' memory warnings cost: `python -m benchmarks.target.governor`. An hour each, simulated.

`benchmarks.rig.macos_memory` plays the kernel's rule over banks of GLM-5.2's size, which count what moving
them copies. Before: a warning was read as "nothing is left", and banks gave up and grew as on Linux.
"""

from benchmarks.rig.macos_memory import GB, WHOLE, CountedBanks, Mac, govern, run
from server.engine.memory.pressure import Room

COMPRESSED_GB = (14.2, 16, 20)
LAGS_S = (0.0, 3.0)
SECONDS = 3600


def hour(compressed_gb: float, lag_s: float, is_before: bool) -> str:
    """Lets the governor live for an hour beside a neighbour that the compressor holds so much of."""
    mac = Mac(CountedBanks(), compressed_bytes=int(compressed_gb * GB), lag_s=lag_s)
    total = 128 * 2**30
    as_before = (lambda: Room(0 if mac.is_warned else total, total)) if is_before else None
    governor, least = govern(mac, as_before), mac.banks.total_slots
    for _ in range(SECONDS):
        run(mac, governor, 1)
        least = min(least, mac.banks.total_slots)
    copied, gone = mac.banks.copied_bytes / GB, (WHOLE - mac.banks.slot_bytes) / GB
    return (
        f"{mac.num_warnings} warnings, at least {least} slots, {copied:.0f} GB copied, "
        f"{gone:.1f} GB given back at the end"
    )


def main() -> None:
    for compressed_gb in COMPRESSED_GB:
        for lag_s in LAGS_S:
            print(f"{compressed_gb} GB compressed, the kernel {lag_s:.0f} s behind")
            print(f"  before: {hour(compressed_gb, lag_s, is_before=True)}")
            print(f"  after:  {hour(compressed_gb, lag_s, is_before=False)}")


if __name__ == "__main__":
    main()
