"""Side by side on the CPU: `python -m benchmarks.peers [--rounds 3] [--nunspark DIR] [--sides NAME ...]`.

Prompts of 512 and of 8,192 tokens, 32 tokens written one at a time, and eight clients at once. Rounds go
through all programs by turns; medians, lowest and highest, and what of each is glmserve's. A prompt of 8,192
that is not read after a minute is left, and its rate is that of what was read: the rest goes slower.

nunspark is asked where it is installed: `pip install --no-deps --target DIR nunspark`. It reads experts
through the page cache, glmserve past it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.peers.sides import CONFIG, SEED, SIDES, Worker, work
from benchmarks.peers.together import COMMANDS, add_tokenizer, rate, serving

WRITTEN, LIMIT_S, CLIENTS = 32, 60, 8
Seen = dict[str, dict[str, list[float]]]


def measure(given: argparse.Namespace, folder: Path) -> Seen:
    """By what was measured, the rates of each side."""
    seen: Seen = {}

    def note(what: str, side: str, value: float) -> None:
        seen.setdefault(what, {}).setdefault(side, []).append(value)
        print(f"{what}, {side}: {value:.2f} tokens/s", flush=True)

    workers = {side: Worker(side, folder, given.nunspark) for side in given.sides}
    workers = {side: worker for side, worker in workers.items() if worker.is_ready}
    for _ in range(given.rounds):
        for side, worker in workers.items():
            if not side.startswith("nunspark"):  # it reads a prompt as mlx-lm does
                note("prompt of 512", side, worker.ask(512, 512, 0, LIMIT_S)[0])
            note("written one by one", side, worker.ask(32, 32, WRITTEN, LIMIT_S)[1])
    for side in [side for side in given.long if side in workers]:
        chunk = 8192 if side.startswith("glmserve") else 64
        note("prompt of 8192", side, workers[side].ask(8192, chunk, 0, given.limit_s)[0])
    for worker in workers.values():
        worker.close()
    for name in COMMANDS if given.together else ():
        with serving(name, folder) as client:
            rate(client, folder, 1, 4)
            for _ in range(max(1, given.rounds)):
                note(f"{CLIENTS} at once", name, rate(client, folder, CLIENTS, 24))
                note("one alone", name, rate(client, folder, 1, 24))
    return seen


def report(seen: Seen) -> None:
    table = Table(title="tokens/s: median (lowest to highest), and glmserve's of it")
    for column in ("", "", "tokens/s", "glmserve / it"):
        table.add_column(column)
    for what, sides in seen.items():
        for side, values in sides.items():
            ours = sides.get("glmserve, a quarter" if "quarter" in side else "glmserve")
            middle = statistics.median(values)
            ratio = f"{statistics.median(ours) / middle:.2f}" if ours else ""
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            table.add_row(what, side, f"{middle:.1f}{spread}", ratio)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--long", nargs="*", choices=SIDES, default=["glmserve", "mlx-lm"])
    parser.add_argument("--limit-s", type=int, default=LIMIT_S, help="for a prompt of 8,192")
    parser.add_argument("--without-servers", dest="together", action="store_false")
    parser.add_argument("--nunspark", default="", metavar="DIR", help="where it was installed")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.folder)
        return
    from models.arithmetic import Quantization
    from tests.checkpoints import save_packed
    from tests.tiny_glm import make_weights

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_packed(folder, CONFIG, make_weights(CONFIG, SEED), lambda path: Quantization(64, 4))
        add_tokenizer(folder)
        report(measure(given, folder))


if __name__ == "__main__":
    main()
