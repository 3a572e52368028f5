"""Six stock openai-python agents on one key: `python -m benchmarks.fleet.titles [--rounds 3]`.

Each talks for some turns with Pocket behind the real server. They name themselves by `user`, by six titles,
or all by one title; the ways take turns, in another order each round. Prints seconds, and the agents that
`glmserve_agents` counted at most.
"""

import argparse
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import httpx
import openai

from tests.server.serving.running import start_server, stop_server

WAYS = ("user", "six titles", "one title")
AGENTS = 6


def talk(url: str, way: str, number: int, seed: int, turns: int) -> None:
    """One agent, as OpenRouter's examples write it."""
    headers = {"six titles": {"X-Title": f"agent {number}"}, "one title": {"X-Title": "fleet"}}.get(way, {})
    named: dict[str, Any] = {"user": f"agent {number}"} if way == "user" else {}
    facts = " ".join(f"Box {seed}-{number}-{at} holds {at * 7 % 50} coins." for at in range(30))
    history: list[Any] = [{"role": "system", "content": f"Round {seed} of {way}. {facts}"}]
    with openai.OpenAI(base_url=url + "/v1", api_key="k", default_headers=headers, timeout=300) as api:
        for turn in range(turns):
            history.append({"role": "user", "content": f"What is {number + 10}+{turn + 20}?"})
            answer = api.chat.completions.create(
                model="glmserve/pocket", messages=history, max_tokens=24, temperature=0, **named
            )
            history.append({"role": "assistant", "content": answer.choices[0].message.content or "-"})


def measure(url: str, way: str, seed: int, turns: int) -> tuple[float, int]:
    """Seconds of the fleet, and the agents that the server saw at once."""
    most, is_over = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not is_over.wait(0.2):
            found = re.search(r"^glmserve_agents (\S+)", httpx.get(url + "/metrics").text, re.MULTILINE)
            most = max(most, int(float(found[1])) if found else 0)

    looker = threading.Thread(target=look)
    looker.start()
    began_s = time.perf_counter()
    with ThreadPoolExecutor(AGENTS) as pool:
        list(pool.map(lambda number: talk(url, way, number, seed, turns), range(AGENTS)))
    seconds = time.perf_counter() - began_s
    is_over.set()
    looker.join()
    return seconds, most


def main(words: Sequence[str] | None = None) -> int:
    """Prints medians and spreads of each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--inflight", type=int, default=1, help="--max-inflight-per-agent of the server")
    options = parser.parse_args(words)
    server = start_server("--max-inflight-per-agent", str(options.inflight))
    seen: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    try:
        measure(server.url, "user", 0, 1)  # what is compiled or loaded once
        for number in range(options.rounds):
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                seen[way].append(measure(server.url, way, number + 1, options.turns))
    finally:
        stop_server(server)
    base = median(seconds for seconds, _ in seen["user"])
    for way, found in seen.items():
        times = sorted(seconds for seconds, _ in found)
        print(
            f"{way:10}: {median(times):.1f} s ({times[0]:.1f} to {times[-1]:.1f}), "
            f"{median(times) / base:.2f} of user, {max(agents for _, agents in found)} agents"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
