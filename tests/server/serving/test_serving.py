"""The whole program as a user runs it: `glmserve` in a process of its own, Pocket behind a real socket."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.commands.checkpoint import POCKET
from server.link.blas import with_fast_blas

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 60
SUM = "What is 17+25?"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=120, max_retries=0)


def start_server(*flags: str) -> Server:
    """Start on a free port and wait until it answers; the port is read from its log."""
    command = [sys.executable, "-u", "-m", "server.cli", "--model", str(POCKET), "--port", "0", *flags]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLMSERVE_")}
    env["GLMSERVE_PREFIX_CACHE_SIZE"] = "0"  # a flag wins: tests share no files that they do not name
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if "listening on" in line)
    url = line.split("listening on ")[1].split()[0]
    deadline = time.monotonic() + START_TIMEOUT_S
    while httpx.get(url + "/health", timeout=10).status_code != 200:
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.1)
    return Server(process, url)


def stop_server(server: Server) -> None:
    server.process.terminate()
    server.process.wait(20)
    assert server.process.stderr is not None
    server.process.stderr.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = start_server()
    yield started
    stop_server(started)


def ask(server: Server, text: str) -> str:
    with server.openai() as api:
        answer = api.chat.completions.create(
            model="glmserve/pocket",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=200,
        )
    return answer.choices[0].message.content or ""


@pytest.mark.slow
def test_a_question_gets_the_right_answer(server: Server) -> None:
    assert "42" in ask(server, SUM)


@pytest.mark.slow
def test_the_stream_carries_the_same_text_and_thoughts_apart(server: Server) -> None:
    content, reasoning = "", ""
    with server.openai() as api:
        stream = api.chat.completions.create(
            model="glmserve/pocket",
            messages=[{"role": "user", "content": SUM}],
            temperature=0,
            max_tokens=200,
            stream=True,
        )
        for chunk in stream:
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert content == ask(server, SUM)
    assert reasoning
    assert "think>" not in content + reasoning


@pytest.mark.slow
def test_curl_streams_an_answer(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": SUM}], "temperature": 0, "stream": True}
    command = ["curl", "--silent", "--no-buffer", server.url + "/v1/chat/completions"]
    done = subprocess.run(
        [*command, "-H", "content-type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    events = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    deltas = [json.loads(event[6:])["choices"] for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices)
    assert "42" in text


@pytest.mark.slow
def test_completions_score_a_prompt_as_an_evaluation_harness_asks(server: Server) -> None:
    """lm-evaluation-harness' local-completions: token ids in, echo, logprobs, one token out."""
    ids = [300, 301, 302, 303, 304]
    with server.openai() as api:
        answer = api.completions.create(
            model="glmserve/pocket",
            prompt=[ids, ids[:3]],
            echo=True,
            logprobs=1,
            max_tokens=1,
            temperature=0,
            seed=1,
        )
    for choice, prompt in zip(answer.choices, (ids, ids[:3]), strict=True):
        assert choice.logprobs is not None
        scores = choice.logprobs.token_logprobs or []
        assert len(scores) == len(prompt) + 1
        assert scores[0] is None  # the first token is predicted by nothing
        assert all(score is not None and score <= 0 for score in scores[1:])


@pytest.mark.slow
def test_streamed_experts_answer_with_the_same_text(server: Server) -> None:
    plan = subprocess.run(
        [sys.executable, "-m", "server.cli", "plan", "--json", "--model", str(POCKET), "--stream-experts"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    smallest = json.loads(plan.stdout)["minimum_budget_bytes"]
    streamed = start_server("--stream-experts", "--ram-budget", str(smallest))
    try:
        assert ask(streamed, SUM) == ask(server, SUM)
        metrics = httpx.get(streamed.url + "/metrics").text
        for line in ("trunk", "experts", "KV cache", "workspace", "MLX buffer cache"):
            planned, used = (
                float(re.findall(rf'^glmserve_memory_{kind}_bytes{{line="{line}"}} (.+)$', metrics, re.M)[0])
                for kind in ("planned", "used")
            )
            assert 0 < used <= planned, line
        assert re.search(r"^glmserve_probe_bytes_per_second \d", metrics, re.M)
        assert re.search(r"^glmserve_probe_depth [1-9]", metrics, re.M)
    finally:
        stop_server(streamed)


@pytest.mark.slow
def test_the_engine_ends_within_two_seconds_when_the_http_process_is_killed() -> None:
    victim = start_server()
    engines = children_of(victim.process.pid)
    assert len(engines) == 1
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait(10)
    assert victim.process.stderr is not None
    victim.process.stderr.close()
    deadline = time.monotonic() + 2
    while is_alive(engines[0]):
        assert time.monotonic() < deadline, "the engine outlived the HTTP process"
        time.sleep(0.05)


@pytest.mark.slow
def test_whoever_still_waits_when_the_server_is_stopped_is_told_so() -> None:
    stopped = start_server()
    ends = json.loads((POCKET / "generation_config.json").read_text())["eos_token_id"]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": SUM}], "max_tokens": 4000}
    body["logit_bias"] = {str(token_id): -100 for token_id in ends}
    url = stopped.url + "/v1/chat/completions"
    with ThreadPoolExecutor() as pool, httpx.Client(timeout=60) as client:
        whole = pool.submit(httpx.post, url, json=body, timeout=60)
        with client.stream("POST", url, json=body | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            events = [next(lines) for _ in range(5)]
            for pid in (*children_of(stopped.process.pid), stopped.process.pid):  # as a service manager does
                os.kill(pid, signal.SIGTERM)
            events += lines
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == (503, "the server is stopping; try again")
    assert len(events) > 20, "answers may go on for a while"
    assert whole.result().status_code == 503
    assert whole.result().json()["error"]["message"] == error["message"]
    stop_server(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_closes_what_it_keeps(tmp_path: Path, number: signal.Signals) -> None:
    stopped = start_server("--prefix-cache-dir", str(tmp_path), "--prefix-cache-size", "100M")
    ask(stopped, SUM)
    assert (tmp_path / "answers.sqlite3-wal").exists(), "what was said is in the file's journal"
    stopped.process.send_signal(number)
    assert stopped.process.wait(20) == 0, "it ended by itself, and was not killed"
    assert not (tmp_path / "answers.sqlite3-wal").exists(), "the file was closed"
    assert stopped.process.stderr is not None
    assert "Traceback" not in stopped.process.stderr.read()
    stopped.process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(with_fast_blas({}) == {}, reason="OpenBLAS is not installed, or MLX computes elsewhere")
def test_the_engine_process_carries_the_fast_blas(server: Server) -> None:
    [engine] = children_of(server.process.pid)
    assert "libopenblas" in Path(f"/proc/{engine}/maps").read_text()


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
