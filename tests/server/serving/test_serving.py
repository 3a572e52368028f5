"""The whole program as a user runs it: answers, streams, and ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.grids import few
from tests.server.serving.running import ROOT, SUM, Server, ask, children_of, start_server, stop_server


def gauge(server: Server, name: str) -> float:
    """A gauge of /metrics."""
    text = httpx.get(server.url + "/metrics", timeout=10).text
    found = re.search(rf"^glmserve_{name} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [1, 2, 4])
def test_requests_are_counted_while_they_run(server: Server, num_requests: int) -> None:
    body = {"prompt": "A", "max_tokens": 2000, "logit_bias": {"100": 100}, "stream": True}  # no end of turn
    with ExitStack() as stack:
        streams = []  # one that is collected hangs up
        for index in range(num_requests):
            asked = httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60)
            streams.append(stack.enter_context(asked).iter_lines())
            next(line for line in streams[-1] if line.startswith("data:"))
            assert gauge(server, "requests_running") == index + 1
            assert gauge(server, "agents") == 1
    deadline = time.monotonic() + 10
    while gauge(server, "requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_question_gets_the_right_answer(server: Server) -> None:
    assert "42" in ask(server, SUM)


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
@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM]))
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


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
