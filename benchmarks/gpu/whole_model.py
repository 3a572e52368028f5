"""The whole server under a budget: `python -m benchmarks.gpu.whole_model FOLDER --ram-budget 100G`.

FOLDER is GLM-5.2 whole with experts as holes (`benchmarks.gpu.true_shapes --layers 78 --dense 3 --share
--holes --mode mxfp4`). Prompts of several lengths, each with a few tokens of answer; beside the times the
bytes of experts that came meanwhile.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

from server.commands.checkpoint import POCKET

PORT, READY_S, ANSWER_S = 8099, 150, 240
PROMPTS = ((16, 24), (16, 24), (4096, 8), (4096, 8))  # the first of a length compiles
COUNTERS = ("expert_bytes", "expert_misses", "stall_seconds", "sweep_reads")


def counters() -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics").read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {
        key: sum(float(value) for name, value in lines if name.endswith((key, f"{key}_total")))
        for key in COUNTERS
    }


def ask(count: int, answer: int, seed: int) -> list[tuple[float, dict[str, float]]]:
    """Seconds until each event of the answer, and the counters then."""
    ids = [(17 + 7919 * (i + seed)) % 4000 for i in range(count)]
    body = {"model": "z-ai/glm-5.2", "prompt": ids, "max_tokens": answer, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    started, events = time.monotonic(), []
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        for line in response:
            if line.startswith(b"data: {"):
                events.append((time.monotonic() - started, counters()))
    return events


def report(count: int, before: dict[str, float], events: list[tuple[float, dict[str, float]]]) -> None:
    first_s, at_first = events[0]
    came = {key: at_first[key] - before[key] for key in COUNTERS}
    print(
        f"prompt of {count}: {first_s:.1f} s, {came['expert_bytes'] / 1e9:.1f} GB of experts came", flush=True
    )
    gaps = [b[0] - a[0] for a, b in pairwise(events)]
    if gaps:
        tokens = len(gaps)
        came = {key: events[-1][1][key] - at_first[key] for key in COUNTERS}
        print(
            f"  {tokens} more: median {statistics.median(gaps):.3f} s ({min(gaps):.3f} to {max(gaps):.3f}),"
            f" mean {sum(gaps) / tokens:.3f}; missed a token {came['expert_bytes'] / tokens / 1e9:.2f} GB,"
            f" waited for reads {came['stall_seconds'] / tokens:.3f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ram-budget", default="100G")
    options = parser.parse_args()
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(POCKET / name, options.folder)
    arguments = ["--model", str(options.folder), "--stream-experts", "--ram-budget", options.ram_budget]
    command = "from server.cli import main; main()"
    server = subprocess.Popen([sys.executable, "-P", "-c", command, *arguments, "--port", str(PORT)])
    try:
        started = time.monotonic()
        while not _is_ready():
            if server.poll() is not None or time.monotonic() - started > READY_S:
                raise SystemExit("the server is not ready; its last lines stand above")
            time.sleep(0.5)
        print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
        for seed, (count, answer) in enumerate(PROMPTS):
            before = counters()
            report(count, before, ask(count, answer, 5 * seed))
    finally:
        server.terminate()
        server.wait(30)


def _is_ready() -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health").status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()
