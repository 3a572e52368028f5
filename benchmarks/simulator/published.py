"""What `config.forecast` makes of machines and engines whose figures are published: `python -m
benchmarks.simulator.published`.

Each point has the bytes of a token's experts, what of them was found in memory (published, or by the share
that their cache holds), and the disk's rate. Other engines hide little of their reads, so nothing is hidden
here: the time is computing and reading.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from config.forecast import MACHINES, found

LAYERS, EXPERTS, TRUNK_BYTES = 75, 19_200, 11e9
METAL = MACHINES["metal"]
FACTOR = 2**30 / 10**9


@dataclass(frozen=True)
class Point:
    """One published figure of decoding GLM-5.x while experts come from disks."""

    name: str
    model_gb: float  # of which 95 % are experts
    disk_gb_per_s: float
    published: float  # tokens a second
    hit: float | None = None
    cache_gb: float = 0.0
    remark: str = ""

    @property
    def hit_rate(self) -> float:
        """As published, or by the share of experts that the cache holds."""
        return self.hit or found(self.cache_gb / (0.95 * self.model_gb))

    @property
    def predicted(self) -> float:
        """Tokens a second."""
        token_bytes = 0.95e9 * self.model_gb / EXPERTS * 8 * LAYERS
        computed_s = (TRUNK_BYTES + token_bytes) / METAL.memory_bytes_per_s + METAL.layer_s * LAYERS
        return 1 / (computed_s + (1 - self.hit_rate) * token_bytes / self.disk_gb_per_s / 1e9)


# Rates: an M5 Max's SSD 13.4 to 14.5 GB/s (three reports); Thunderbolt 5 about 6; M1 Ultra by its wait of
# 57 % of 0.67 s for 2.6 GB.
OTHER = "the constants are an M5 Max's"
POINTS = (
    Point("colibri #537, int4", 370, 14, 2.89, 0.743),
    Point("colibri #387, int4", 370, 14, 2.285, 0.68),
    Point("colibri, 46.9 GB pinned", 370, 14, 2.06, 0.725, remark="not known; another version than #537"),
    Point("ds4, 2 bit, 188 GiB", 188 * FACTOR, 13.5, 4.8, cache_gb=61 * FACTOR),
    Point("ds4, 2 bit, 197 GiB", 197 * FACTOR, 13.5, 5.11, cache_gb=65.5, remark="it reads a layer ahead"),
    Point("ds4 #491, 2 bit", 211, 13.5, 2.4, cache_gb=65.5, remark="its cache is not told"),
    Point("argodrive, 4 bit, one drive", 434, 14, 2.02, cache_gb=75),
    Point("argodrive, four drives", 434, 14 + 3 * 6, 3.70, cache_gb=75),
    Point("gmlx, 3 bit", 282, 13.5, 2.51, 0.88, remark="its clock sags, 4.3 ms a layer"),
    Point("gmlx, lossy", 282, 13.5, 3.64, 0.88, remark="its hits count guesses and what it sheds"),
    Point("mlx-lm #1438", 407, 13.5, 0.57, 0.44, remark="evaluates whole layers, by the page cache"),
    Point("colibri, M4 Max, TB5 disk", 370, 6, 1.12, 0.705, remark=OTHER),
    Point("colibri, M1 Ultra", 370, 6.8, 1.50, 0.787, remark=OTHER),
)  # fmt: skip


def main() -> None:
    table = Table(title="tokens/s, predicted with nothing hidden, and published")
    for column in ("", "found in memory", "predicted", "published", "ratio", "cause"):
        table.add_column(column)
    for one in POINTS:
        ratio = one.predicted / one.published
        cause = one.remark if abs(ratio - 1) > 0.2 or one is POINTS[0] else ""
        table.add_row(
            one.name,
            f"{one.hit_rate:.0%}",
            f"{one.predicted:.2f}",
            f"{one.published:.2f}",
            f"{ratio:.2f}",
            cause,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
