"""One model on two ranks as a user starts it: the answers of one machine, and a lost rank is noticed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from server.commands.checkpoint import POCKET
from server.engine.cluster.meeting import free_address
from tests.server.serving.running import ROOT, SUM, Server, children_of, start_server, stop_server
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
BUDGET = ("--stream-experts", "--ram-budget", "790M")
KEY = ("--cluster-key", "of these two ranks")
BACK_WITHIN_S = 15.0
NUM_CLIENTS = 6


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([[free_address("127.0.0.1:0")] for _ in range(2)]))
    return path


@contextmanager
def running(*flags: str) -> Iterator[Server]:
    """A server, after whose end none of its processes is left."""
    server = start_server(*flags)
    processes = set(children_of(server.process.pid))
    try:
        yield server
        processes |= set(children_of(server.process.pid))
    finally:
        stop_server(server)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def ranks_of(server: Server) -> dict[str, int]:
    """The processes of both ranks by their modules."""
    pids = children_of(server.process.pid)
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") for pid in pids}
    return {module: pid for pid, given in words.items() for module in given if module.startswith("server.")}


def is_ready(server: Server) -> bool:
    return httpx.get(server.url + "/health", timeout=10).status_code == 200


def completion(server: Server, number: int) -> str:
    """The greedy continuation of one of the clients' prompts, or how it failed."""
    body = {"model": "glmserve/pocket", "prompt": f"{number} {SUM}", "temperature": 0, "max_tokens": 12}
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    if answer.status_code == 200 and "choices" in answer.json():
        text: str = answer.json()["choices"][0]["text"]
        return text
    error = answer.json()["error"]
    assert error["code"] == 503, error
    return "refused"


def test_two_ranks_answer_as_one_and_come_back_when_one_is_lost(server: Server, hosts: Path) -> None:
    with running(*BUDGET, "--nodes", str(hosts)) as cluster:
        assert [completion(cluster, n) for n in range(2)] == [completion(server, n) for n in range(2)]
        os.kill(ranks_of(cluster)["server.engine.cluster.follower"], signal.SIGKILL)
        assert completion(cluster, 2) == "refused"
        wait_until(lambda: is_ready(cluster), BACK_WITHIN_S)
        assert completion(cluster, 2) == completion(server, 2)


@pytest.mark.long
def test_a_rank_started_by_hand_is_missed_when_it_is_gone(server: Server, hosts: Path) -> None:
    """After the restart the server goes on with the ranks that are left: itself."""
    flags = [*BUDGET, "--nodes", str(hosts), *KEY]
    command = [sys.executable, "-m", "server.cli", "--model", str(POCKET), "--rank", "1", *flags]
    with ExitStack() as stack:
        rank = stack.enter_context(subprocess.Popen(command, cwd=ROOT))
        stack.callback(rank.kill)
        first = stack.enter_context(running("--rank", "0", *flags))
        assert completion(first, 1) == completion(server, 1)
        followers = children_of(rank.pid)
        rank.terminate()
        assert rank.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in followers)
        wait_until(lambda: not is_ready(first), BACK_WITHIN_S)
        wait_until(lambda: is_ready(first), BACK_WITHIN_S)
        assert completion(first, 2) == completion(server, 2)


@pytest.mark.long
def test_ranks_that_are_killed_or_stopped_at_any_moment(hosts: Path) -> None:
    rng, outcomes, over = random.Random(7), Counter[str](), threading.Event()
    flags = (*BUDGET, "--nodes", str(hosts), "--step-timeout", "8")
    with running(*flags) as cluster:
        log = cluster.process.stderr
        assert log is not None
        threading.Thread(target=lambda: list(log), daemon=True).start()  # or the server would wait
        expected = [completion(cluster, number) for number in range(NUM_CLIENTS)]

        def client(number: int) -> None:
            while not over.is_set():
                text = completion(cluster, number)
                outcomes["right" if text == expected[number] else text] += 1
                time.sleep(0.5 if text == "refused" else 0.0)  # as clients do that are told when to retry

        clients = [threading.Thread(target=client, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in clients:
            thread.start()
        for number in range(20):
            completed = outcomes["right"]  # five deaths without a complete request would be too many
            wait_until(lambda before=completed: outcomes["right"] > before, 60)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 2.0))
            module = ["server.engine.cluster.follower", "server.engine.worker"][number % 2]
            os.kill(ranks_of(cluster)[module], signal.SIGSTOP if number % 4 > 1 else signal.SIGKILL)
            lost_at = time.monotonic()
            wait_until(lambda: not is_ready(cluster), BACK_WITHIN_S)
            wait_until(lambda: is_ready(cluster), BACK_WITHIN_S)
            print(f"{number}: back after {time.monotonic() - lost_at:.1f} s")
        over.set()
        for thread in clients:
            thread.join()
    assert set(outcomes) <= {"right", "refused"}, outcomes
    assert outcomes["right"] > 20
