"""Draws the plots of docs/performance.md, for light and dark pages: `python -m docs.pictures.plots`.

All is `config.forecast`, which `glmserve plan` prints too.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path

from config.forecast import M3_ULTRA, MACHINES, Forecast, Machine, forecast
from config.plan import Geometry, MemoryPlan, make_plan
from docs.pictures.draw import HERE, Picture
from models.arithmetic import METAL
from models.loading.loading import make_geometry, open_checkpoint
from models.loading.public_formats import PUBLIC_FORMATS, write_hollow

GB, CONTEXT = 10**9, 32_768
COLOURS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Buyer:
    """A machine as it is bought: its budget, its disk, and what it can do."""

    name: str
    budget_bytes: int
    disk_bytes_per_s: float
    machine: Machine

    def expects(self, budget_bytes: int | None = None, disk: float | None = None, **what: int) -> Forecast:
        """GLM-5.2 at 3.5 bits a weight on it, as `glmserve plan` has it."""
        plan = planned(budget_bytes or self.budget_bytes, max(CONTEXT, what.get("context", 0)))
        return forecast(geometry(), plan, disk or self.disk_bytes_per_s, self.machine, **what)


M5_MAX = Buyer("M5 Max 128 GB", 100 * GB, 13.5e9, MACHINES["metal"])
ULTRA = Buyer("M3 Ultra 256 GB", 205 * GB, 6.5e9, M3_ULTRA)
LINUX = Buyer("Linux, one 80 GB GPU", 76 * GB, 7e9, MACHINES["cuda"])
BUYERS = (M5_MAX, ULTRA, LINUX)


@cache
def geometry() -> Geometry:
    """Of the public checkpoint of 3.5 bits a weight."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_hollow(Path(folder), PUBLIC_FORMATS[0]))
        return make_geometry(checkpoint, METAL, CONTEXT)


@cache
def planned(budget_bytes: int, context: int = CONTEXT) -> MemoryPlan:
    """The plan of this budget, on a machine that has it."""
    return make_plan(geometry(), budget_bytes, context, physical_bytes=max(budget_bytes, 128 * GB))


Line = tuple[str, Sequence[tuple[float, float]]]


def plot(
    title: str, across: str, up: str, lines: Sequence[Line], *,
    is_log: bool = False,
) -> Picture:  # fmt: skip
    """Lines over a grid; `is_log`: both axes by factors."""
    page = Picture(720, 380, title)
    page.text(20, 24, title, "title")
    points = [point for _, line in lines for point in line]
    place = _axes(page, points, is_log)
    page.text(560, 350, across)
    page.text(20, 44, up)
    for number, (name, line) in enumerate(lines):
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in map(place, line))
        page.parts.append(f'<polyline class="line {COLOURS[number]}" points="{path}"/>')
        x, y = place(line[-1])
        page.text(min(x + 6, 590), y + 4, name)
    return page


def _axes(
    page: Picture, points: Sequence[tuple[float, float]], is_log: bool
) -> Callable[[tuple[float, float]], tuple[int, int]]:
    """Draws the grid; returns where a point lies on the page."""
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    top = max(ys)

    def part(value: float, low: float, high: float) -> float:
        return log(value / low) / log(high / low) if is_log else (value - low) / (high - low)

    low_y = min(ys) if is_log else 0.0

    def place(point: tuple[float, float]) -> tuple[int, int]:
        return round(60 + 510 * part(point[0], xs[0], xs[-1])), round(320 - 260 * part(point[1], low_y, top))

    shown = xs if len(xs) <= 8 else xs[:: -(-len(xs) // 8)]
    for x in shown:
        at, _ = place((x, top))
        page.text(at - 8, 336, f"{x:g}")
    steps = (
        [low_y * (top / low_y) ** (i / 4) for i in range(5)] if is_log else [top * i / 4 for i in range(5)]
    )
    for y in steps:
        _, at = place((xs[0], y))
        page.parts.append(f'<line class="grid" x1="60" x2="570" y1="{at}" y2="{at}"/>')
        page.text(20, at + 4, f"{y:.3g}")
    return place


def budgets() -> Picture:
    """Tokens a second by budget and disk, one agent."""
    sizes = [40, 60, 80, 100, 115]
    lines = [
        (f"{rate:g} GB/s", [(n, M5_MAX.expects(n * GB, rate * 1e9).tokens_per_s) for n in sizes])
        for rate in (27, 13.5, 7, 4)
    ]
    title = "M5 Max: tokens/s of one agent by --ram-budget and disk (computed)"
    page = plot(title, "budget, GB", "tokens/s", lines)
    page.text(60, 366, "of the experts asked for are found in memory:")
    for number, size in enumerate(sizes):
        found = M5_MAX.expects(size * GB).hit_rate
        page.text(320 + 75 * number, 366, f"{size}G {found:.0%}")
    return page


def prompts() -> Picture:
    """Seconds to the first token by length of the prompt."""
    lengths = [128, 512, 2048, 8192, 32_768]
    lines = [(one.name, [(n, one.expects(prompt=n).first_token_s) for n in lengths]) for one in BUYERS]
    return plot(
        "Seconds to the first token of a new prompt (computed)", "tokens", "seconds", lines, is_log=True
    )


def agents() -> Picture:
    """Tokens a second of all agents together."""
    counts = [1, 2, 4, 8, 16]
    lines = [(one.name, [(n, one.expects(agents=n).tokens_per_s) for n in counts]) for one in BUYERS]
    return plot("tokens/s of all agents together (computed)", "agents", "tokens/s", lines)


PLOTS = {"budgets.svg": budgets, "prompts.svg": prompts, "agents.svg": agents}


def table() -> str:
    """The one table of docs/performance.md."""
    lines = ["| | " + " | ".join(one.name for one in BUYERS) + " |", "|---" * (1 + len(BUYERS)) + "|"]
    rows: dict[str, Callable[[Buyer], str]] = {
        "budget, disk": lambda b: f"{b.budget_bytes / GB:.0f}G, {b.disk_bytes_per_s / 1e9:g} GB/s",
        "experts in memory": lambda b: f"{planned(b.budget_bytes).slots_per_layer[-1]} of 256 a layer",
        "found in memory": lambda b: f"{b.expects().hit_rate:.0%}",
        "tokens/s at 4k": lambda b: f"{b.expects(context=4096).tokens_per_s:.1f}",
        "at 32k": lambda b: f"{b.expects(context=32_768).tokens_per_s:.1f}",
        "at 128k": lambda b: f"{b.expects(context=131_072).tokens_per_s:.1f}",
        "4 agents together": lambda b: f"{b.expects(agents=4).tokens_per_s:.1f}",
        "16 agents together": lambda b: f"{b.expects(agents=16).tokens_per_s:.1f}",
        "first token of 512": lambda b: f"{b.expects(prompt=512).first_token_s:.0f} s",
        "of 4,096": lambda b: f"{b.expects(prompt=4096).first_token_s:.0f} s",
        "of 32,768": lambda b: f"{b.expects(prompt=32_768).first_token_s:.0f} s",
        "with half the disk's rate": lambda b: (
            f"{b.expects(disk=b.disk_bytes_per_s / 2).tokens_per_s:.1f} tokens/s"
        ),
    }
    lines += [f"| {name} | " + " | ".join(of(one) for one in BUYERS) + " |" for name, of in rows.items()]
    return "\n".join(lines)


def sensitivity() -> str:
    """Tokens/s of an M5 Max where the disk's rate, or what is found, is not what was assumed."""
    off, own = (0.5, 0.75, 1.0, 1.25, 1.5), M5_MAX.disk_bytes_per_s
    disks = [f"{M5_MAX.expects(disk=part * own).tokens_per_s:.1f}" for part in off]
    # A tenth more that is found is a tenth less of the rest: the disk has as much less to read.
    rest = 1 - M5_MAX.expects().hit_rate
    points = (-10, -5, 0, 5, 10)
    hits = [
        f"{M5_MAX.expects(disk=own * rest / (rest - change / 100)).tokens_per_s:.1f}" for change in points
    ]
    return "\n".join(
        [
            "| the disk's rate | " + " | ".join(f"{part:g} x" for part in off) + " |", "|---" * 6 + "|",
            "| tokens/s | " + " | ".join(disks) + " |",
            "| **points found more or less** | " + " | ".join(f"**{change:+d}**" for change in points) + " |",
            "| tokens/s | " + " | ".join(hits) + " |",
        ]
    )  # fmt: skip


def main() -> None:
    for name, draw in PLOTS.items():
        (HERE / name).write_text(draw().svg(), encoding="utf-8")
    print(table())
    print(sensitivity())


if __name__ == "__main__":
    main()
