"""How many keys Pocket finds with each known fault planted.

The faults are those of tests/models/mutants.py, run in MLX, each in a process of its own on one core; the
first row is the model as it is. Greedy, held-out needles in long prompts. Counts are shown as they come, so
a run that is cut short still says what it has seen.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import Tokenizer

from server.commands.checkpoint import POCKET
from tests.models.mutants import MUTANTS, head_dim_as_rotary_width
from training.pocket.data.render import prompt_text
from training.pocket.evaluation.cases import Case, make_needles
from training.pocket.evaluation.check import is_right, parse_text
from training.pocket.evaluation.decode import end_ids, greedy, open_pocket

RIGHT = "as it is"
LENGTHS = (2048, 4096)
MAX_TOKENS = 96
REPORT_SECONDS = 30.0
Plant = Callable[[pytest.MonkeyPatch], None]
# Pocket's head_dim is its rotary width, which would be no fault; its whole query head is twice as wide.
PLANTS: dict[str, Plant] = {
    RIGHT: lambda patch: None,
    **{plant.__name__: plant for plant in MUTANTS},
    "head_dim_as_rotary_width": partial(head_dim_as_rotary_width, head_dim=64),
}


def answer_needles(name: str, per_length: int, out: Path) -> None:
    """Plants one fault, answers all needles, lengths in turn, and keeps the counts in a file."""
    tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    cases = [list(make_needles(n, per_length, lambda text: len(encode(text)))) for n in LENGTHS]
    with pytest.MonkeyPatch.context() as patch:
        PLANTS[name](patch)
        model, ends = open_pocket(POCKET), end_ids(POCKET)
        asked: Counter[str] = Counter()
        right: Counter[str] = Counter()
        for case in (case for turn in zip(*cases, strict=True) for case in turn):
            ids = greedy(model, encode(prompt_text(case.sample)), ends, MAX_TOKENS)
            asked[case.kind] += 1
            right[case.kind] += answered(case, str(tokenizer.decode(ids, skip_special_tokens=False)))
            out.with_suffix(".new").write_text(json.dumps({k: (right[k], asked[k]) for k in asked}))
            out.with_suffix(".new").replace(out)


def answered(case: Case, text: str) -> bool:
    return is_right(case, parse_text(text, case.sample.thinking))


def table(folder: Path) -> str:
    """A markdown row for each fault: right of asked, by length."""
    lines = [
        "| fault | " + " | ".join(f"{n:,} tokens" for n in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    for name in PLANTS:
        path = folder / f"{name}.json"
        counts = json.loads(path.read_text()) if path.exists() else {}
        cells = ["/".join(map(str, counts.get(f"needle_{n}", ("-",)))) for n in LENGTHS]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_all(names: list[str], jobs: int, per_length: int, seconds: float, folder: Path) -> None:
    """Up to `jobs` processes at a time; those still running when the time is over are ended."""
    environment = {**os.environ} | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    waiting, running = list(names), list[subprocess.Popen[bytes]]()
    start = reported = time.monotonic()
    while (waiting or running) and time.monotonic() - start < seconds:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = [sys.executable, "-m", "training.pocket.evaluation.planted_faults", "--one", name]
            command += ["--per-length", str(per_length), "--out", str(folder)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(0.5)
        running = [process for process in running if process.poll() is None]
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"{reported - start:.0f} s\n{table(folder)}", flush=True)
    for process in running:
        process.kill()
        process.wait()
    print(f"{time.monotonic() - start:.0f} s\n{table(folder)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-length", type=int, default=12, help="needles of each length")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--only", nargs="*", choices=PLANTS, default=list(PLANTS), help="only these faults")
    parser.add_argument("--out", type=Path, help="folder for the counts, one JSON file a fault")
    parser.add_argument("--one", choices=PLANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        answer_needles(args.one, args.per_length, args.out / f"{args.one}.json")
        return
    with TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run_all(args.only, args.jobs, args.per_length, args.seconds, folder)


if __name__ == "__main__":
    main()
