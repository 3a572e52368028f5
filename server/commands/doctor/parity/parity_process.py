"""The process of `glmserve doctor --parity`: `python -m server.commands.doctor.parity.parity_process FILE`.

It runs in the engine's own environment, so that what it finds is what the engine does, and apart from the
command, so that a crash inside a driver is a finding too. Each line of FILE is written at once.
"""

import json
import re
import sys
from pathlib import Path

from config.settings import Settings
from server.commands.doctor.doctor_command import run_checks
from server.commands.doctor.parity.parity_checks import PARITY_CHECKS
from server.version import VERSION

# An error's text may name a folder, and that a person.
_PATH = re.compile(r"(?<![\w/.])[/~][^\s:'\",]+")


def main(path: Path) -> int:
    """Runs all checks into the report; returns 1 if any finding is a fault."""
    with path.open("w", encoding="utf-8") as report:

        def record(line: dict[str, object]) -> None:
            print(_PATH.sub("(path)", json.dumps(line)), file=report, flush=True)

        record({"glmserve": VERSION})
        return run_checks(PARITY_CHECKS, Settings(), record)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
