"""SIGTERM under load, to the main process or to its group: every request ends in words, nothing is lost."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.server.serving.running import Server, start_server, stop_server
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]

ENDLESS = {
    str(end): -100 for end in json.loads((POCKET / "generation_config.json").read_text())["eos_token_id"]
}
# How each dialect ends a stream well, and how in words.
ENDINGS = ("data: [DONE]", '"message_stop"', '"response.completed"', '"response.incomplete"')


def story(number: int) -> str:
    return " ".join(f"In year {number}{at} the tower had {at * 7 % 50} steps." for at in range(20))


def body_of(path: str, number: int, streams: bool) -> dict[str, Any]:
    return {"model": "glmserve/pocket", "stream": streams} | _prompt_of(path, number)


def _prompt_of(path: str, number: int) -> dict[str, Any]:
    text = story(number)
    if path == "/v1/responses":
        return {"input": text, "max_output_tokens": 500}
    if path == "/v1/completions":
        return {"prompt": text, "max_tokens": 500, "logit_bias": ENDLESS}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 500}
    return body if path == "/v1/messages" else body | {"logit_bias": ENDLESS}


class Client:
    """One request, and how it ended."""

    def __init__(self, server: Server, number: int, path: str, streams: bool) -> None:
        self._url, self._number, self._path, self._streams = server.url, number, path, streams
        self.num_events = 0

    def run(self) -> str:
        """Returns "whole" or "told"; anything else is a fault."""
        body = body_of(self._path, self._number, self._streams)
        headers = {"X-Session-Id": f"agent {self._number % 3}"}
        try:
            with httpx.stream(
                "POST", self._url + self._path, json=body, headers=headers, timeout=60
            ) as answer:
                lines = []
                for line in answer.iter_lines():
                    lines.append(line)
                    self.num_events += line.startswith("data: ")
        except httpx.HTTPError as error:
            return f"cut: {type(error).__name__}"
        text = "\n".join(lines)
        if not self._streams:
            return "whole" if '"usage"' in text and '"error"' not in text else self._told(text)
        return "whole" if any(one in text for one in ENDINGS) else self._told(text)

    def _told(self, text: str) -> str:
        return "told" if "the server is stopping" in text else f"cut: {text[-200:]}"


LOAD = [
    ("/v1/chat/completions", True), ("/api/v1/chat/completions", True), ("/v1/messages", True),
    ("/v1/responses", True), ("/v1/completions", True), ("/v1/chat/completions", False),
    ("/v1/messages", False), ("/v1/chat/completions", True), ("/v1/completions", True),
]  # fmt: skip


def num_writing(server: Server) -> int:
    now = httpx.get(server.url + "/v1/activity", timeout=10).json()["data"]
    return sum(one["phase"] == "writing" for one in now)


@pytest.mark.parametrize("to_group", [False, True], ids=["main process", "whole group"])
def test_sigterm_under_load_cuts_nothing_and_the_next_start_is_warm(tmp_path: Path, to_group: bool) -> None:
    flags = [
        "--prefix-cache-dir",
        str(tmp_path),
        "--prefix-cache-size",
        "1G",
        "--max-inflight-per-agent",
        "2",
    ]
    server = start_server(*flags, leads_group=True)
    clients = [Client(server, number, *kind) for number, kind in enumerate(LOAD)]
    with ThreadPoolExecutor(len(LOAD)) as pool:
        outcomes = [pool.submit(client.run) for client in clients]
        wait_until(lambda: num_writing(server) >= 4, 60)
        (os.killpg if to_group else os.kill)(server.process.pid, signal.SIGTERM)
        ended = [one.result(60) for one in outcomes]
    written = [number for number in (0, 1, 7) if clients[number].num_events > 3 and ended[number] == "told"]
    assert server.process.wait(30) == 0
    stop_server(server)
    assert set(ended) <= {"whole", "told"}, ended
    assert written, "some were under way"
    again = start_server(*flags)
    try:
        cached = []
        for number in written:  # nobody has asked these before, and none was answered to its end
            body = {"messages": [{"role": "user", "content": story(number)}], "max_tokens": 1}
            usage = httpx.post(again.url + "/v1/chat/completions", json=body, timeout=60).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
        assert min(cached) > 0.5, cached
    finally:
        stop_server(again)
