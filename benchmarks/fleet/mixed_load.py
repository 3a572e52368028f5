"""Mixed load over HTTP, as long as wanted: `python -m benchmarks.fleet.mixed_load [--minutes 30] [--kills]`.

`glmserve` itself with Pocket and a quarter of its experts in memory, eight clients that ask streamed and
whole, short and long, and leave in the middle. Prints the memory of both processes over time and how the
requests ended; ends with 1 where one ended in neither a right answer, a refusal with the time to come back,
nor, with --kills, an explicit error.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.server.serving.running import Server, children_of, start_server, stop_server

NUM_CLIENTS = 8
SAMPLE_S = 30.0
GOOD = {"answered", "left", "refused", "died and said so"}


class Load:
    """Clients that ask until the time is over."""

    def __init__(self, server: Server, ends_at: float) -> None:
        self._server, self._ends_at = server, ends_at
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()

    def run(self, seed: int) -> None:
        """One client."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self._server.url, timeout=300) as http:
            while time.monotonic() < self._ends_at:
                try:
                    outcome = self._ask(http, rng, f"agent{seed}")
                except httpx.HTTPError as error:
                    outcome = f"broken off: {type(error).__name__}"
                with self._lock:
                    self.outcomes[outcome] += 1
                if outcome != "answered":
                    time.sleep(0.5)

    def _ask(self, http: httpx.Client, rng: random.Random, agent: str) -> str:
        body = {
            "prompt": [rng.randrange(300, 1000) for _ in range(rng.choice([5, 40, 200, 600]))],
            "max_tokens": rng.randint(1, 40),
            "session_id": agent,
            "stream": rng.random() < 0.6,
        }
        leaves_after = rng.randint(1, 10) if rng.random() < 0.3 else None
        if not body["stream"]:
            answer = http.post("/v1/completions", json=body)
            return "answered" if answer.status_code == 200 else _of_status(answer)
        with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                return _of_status(answer)
            last, count = "", 0
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    last, count = line[6:], count + 1
                if count == leaves_after:
                    return "left"
        if last == "[DONE]":
            return "answered"
        return _of_error(json.loads(last).get("error") if last else None)


def _of_status(answer: httpx.Response) -> str:
    if answer.status_code == 503 and "retry-after" in answer.headers:
        return "refused"
    return f"{answer.status_code}: {answer.text[:80]}"


def _of_error(error: dict[str, str | int] | None) -> str:
    if error is None:
        return "cut off without a word"
    return "died and said so" if error["code"] == 503 else f"{error['code']}: {error['message']}"


def resident_mb(pid: int) -> float:
    """Memory of a process, 0 where it has just gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--budget", default="766M", help="--ram-budget of the server")
    parser.add_argument("--kills", action="store_true", help="kill the engine every two minutes")
    given = parser.parse_args()
    server = start_server("--stream-experts", "--ram-budget", given.budget)
    threading.Thread(target=_drain, args=[server], daemon=True).start()
    ends_at = time.monotonic() + 60 * given.minutes
    load = Load(server, ends_at)
    clients = [threading.Thread(target=load.run, args=[seed]) for seed in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    started_at, sample_s = time.monotonic(), min(SAMPLE_S, 60 * given.minutes / 10)
    killed_at = started_at
    while time.monotonic() < ends_at:
        time.sleep(sample_s)
        engines = children_of(server.process.pid)
        memory = ", ".join(f"{resident_mb(pid):.1f}" for pid in [server.process.pid, *engines])
        print(f"{time.monotonic() - started_at:6.0f} s: MB of HTTP, engine: {memory}; {dict(load.outcomes)}")
        if given.kills and engines and time.monotonic() - killed_at > 120:
            os.kill(engines[0], signal.SIGKILL)
            killed_at = time.monotonic()
    for client in clients:
        client.join()
    time.sleep(6)
    print([line for line in httpx.get(server.url + "/metrics").text.splitlines() if "requests_" in line])
    stop_server(server)
    return 0 if set(load.outcomes) <= GOOD else 1


def _drain(server: Server) -> None:
    """The server's log goes nowhere, but somebody must read it."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if "ERROR" in line:
            print(line, end="")


if __name__ == "__main__":
    sys.exit(main())
