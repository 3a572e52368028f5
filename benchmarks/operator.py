"""What an operator feels of glmserve: `python -m benchmarks.operator [--seconds 60] [--rounds 10]`.

Prints how long the installed console script takes for `--version` and `--help`, by the clock, and how much of
a core an idle server's two processes take, alone and while its page is open in a headless Chromium. 0 seconds
or rounds leave a part out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

from tests.server.serving.running import ask, children_of, start_server, stop_server

SCRIPT = Path(sys.executable).with_name("glmserve")
TICKS = os.sysconf("SC_CLK_TCK")
# Compiling, the first collections and a prompt's save are over by then.
SETTLE_S = 10


def time_words(words: str, rounds: int) -> None:
    """Prints the seconds of one call of the console script."""
    seconds = []
    for _ in range(rounds + 1):
        began_s = time.perf_counter()
        subprocess.run([SCRIPT, words], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began_s)
    found = sorted(seconds[1:])  # the first one compiles
    print(f"glmserve {words}: {median(found):.3f} s ({found[0]:.3f} to {found[-1]:.3f})", flush=True)


def cpu_s(pid: int) -> float:
    """Processor time that a process and its threads have taken, in the kernel too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure_idle(seconds: float, flags: Sequence[str], has_page: bool) -> None:
    """Prints each process's share of a core; the server has answered once before."""
    server = start_server(*flags)
    with ExitStack() as stack:
        stack.callback(stop_server, server)
        ask(server, "What is 17+25?")
        asked: list[str] = []
        if has_page:
            driver = stack.enter_context(sync_playwright())
            options = ["--no-sandbox", "--disable-gpu"]
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=options)
            stack.callback(browser.close)
            page = browser.new_page(viewport={"width": 1280, "height": 2000})  # all of it is seen
            page.on("request", lambda one: asked.append(one.url))
            page.goto(server.url)
            page.wait_for_timeout(1000 * SETTLE_S)
        else:
            time.sleep(SETTLE_S)
        processes = {"HTTP": server.process.pid, "engine": children_of(server.process.pid)[0]}
        asked.clear()
        before = {name: cpu_s(pid) for name, pid in processes.items()}
        if has_page:
            page.wait_for_timeout(1000 * seconds)
        else:
            time.sleep(seconds)
        shares = [
            f"{name} {100 * (cpu_s(pid) - before[name]) / seconds:.2f} %" for name, pid in processes.items()
        ]
        how = f"page open, {len(asked)} requests of it" if has_page else "no page"
        print(
            f"idle for {seconds:.0f} s, {' '.join(flags) or 'resident'}, {how}: {', '.join(shares)}",
            flush=True,
        )


def main() -> None:
    """Measures the two words, then idleness in four ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    for words in ("--version", "--help") if given.rounds else ():
        time_words(words, given.rounds)
    for flags in ((), ("--stream-experts",)) if given.seconds else ():
        for has_page in (False, True):
            measure_idle(given.seconds, flags, has_page)


if __name__ == "__main__":
    main()
