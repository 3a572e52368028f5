"""Adds up the counts of several evaluations and prints the table of the README beside what was wanted.

`python -m training.pocket.evaluation.report COUNTS.json ...`, the files that evaluate.py writes with
`--counts`. Owns the table's rows and the wanted shares (the project's own aims).
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

Counts = dict[str, tuple[int, int]]
# The row's name in the counts, what the table calls it, and the wanted share in percent.
ROWS: tuple[tuple[str, str, float | None], ...] = (
    ("arithmetic", "arithmetic", 95),
    ("facts", "facts", 95),
    ("json validity", "JSON validity", 99),
    ("tool_call", "tool name and arguments exact", 95),
    ("call decision", "decision to call or not", 97),
    ("tool_result", "answer after a tool result", 95),
    ("thinking obeyed", "thinking on and off obeyed", 100),
    ("needle_512", "needle at 512 tokens", 95),
    ("needle_1024", "needle at 1,024 tokens", 95),
    ("needle_2048", "needle at 2,048 tokens", 95),
    ("needle_4096", "needle at 4,096 tokens", 95),
    ("no_call", "no call when none fits, with the right answer", None),
    ("turns", "several turns", None),
    ("json", "JSON with every value right", None),
)


def added(parts: Iterable[Counts]) -> Counts:
    """The sums of right and asked by row."""
    total: Counts = {}
    for part in parts:
        for name, (right, asked) in part.items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + right, before[1] + asked)
    return total


def markdown(counts: Counts) -> str:
    """The table; a missed row is bold, rows that were not asked are left out."""
    lines = ["| what | right | wanted |", "|---|---|---|"]
    for name, title, wanted in ROWS:
        if name not in counts:
            continue
        right, asked = counts[name]
        share = f"{100 * right / asked:.1f} % ({right}/{asked})".replace("100.0 %", "100 %")
        missed = wanted is not None and 100 * right < wanted * asked
        aim = "" if wanted is None else f"{wanted:g} %"
        lines.append(f"| {title} | {f'**{share}**' if missed else share} | {aim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=Path, nargs="+")
    files = parser.parse_args().counts
    print(markdown(added(json.loads(path.read_text()) for path in files)))


if __name__ == "__main__":
    main()
