"""What an operator is told while the model loads, and once it answers.

On a terminal loading is a progress bar, elsewhere a line in the log every ten seconds.
"""

import asyncio
import logging
import sys
import time

from config.sizes import format_size
from server.link.engine_protocol import Engine, EngineStatus

LOOK_S = 0.2
LINE_S = 10.0

log = logging.getLogger(__name__)


async def tell_start(engine: Engine, model_id: str, page: str) -> None:
    """Tells how loading goes on, then what was made of the budget."""
    status = await (_with_bar if sys.stderr.isatty() else _with_lines)(engine)
    for line in start_lines(status, model_id, page):
        log.info("%s", line)


async def _with_lines(engine: Engine) -> EngineStatus:
    told_s = time.monotonic()
    while (status := engine.status).state != "ready":
        if status.state == "loading" and time.monotonic() - told_s > LINE_S:
            told_s = time.monotonic()
            log.info("loading %.0f %%: %s", 100 * status.fraction, status.text)
        await asyncio.sleep(LOOK_S)
    return status


async def _with_bar(engine: Engine) -> EngineStatus:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=1.0)
        while (status := engine.status).state != "ready":
            progress.update(task, completed=status.fraction, description=status.text or "loading")
            await asyncio.sleep(LOOK_S)
    return status


def start_lines(status: EngineStatus, model_id: str, page: str) -> list[str]:
    """A few lines: the model, the plan, slots, the disk, what to expect, and where the page is."""
    values = status.stats.values if status.stats else {}
    context = status.info.context_length if status.info else 0
    planned = {
        name.partition(".")[2]: int(value) for name, value in values.items() if name.startswith("planned.")
    }
    lines = [f"ready: {model_id}, context {context} tokens"]
    if planned:
        parts = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in planned.items() if nbytes)
        lines.append(f"plan: {format_size(int(values['budget_bytes']))} = {parts}")
    if slots := values.get("slots"):
        disk = values.get("probe_bytes_per_s")
        rate = f"; the disk reads {format_size(int(disk))}/s" if disk else ""
        lines.append(f"slots: {slots:.0f} experts fit in memory{rate}")
    if text := status.info.forecast if status.info else "":
        lines.append(f"expected: {text}")
    return [*lines, f"what happens now: {page}"]
