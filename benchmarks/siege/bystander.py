"""A client that does no harm: what it is answered, and how long it waits, beside whatever others do.

`python -m benchmarks.siege.bystander URL` is a process of its own, that asks on two threads with plain
sockets: what it measures is the server, not the making of a client (56 ms of a processor for one of httpx).
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from benchmarks.siege.cage import KEYS, ROOT

QUESTIONS = ["What is 17+25?", "What is 8+5?", "What is the capital of France?", "What is 31+44?"]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}},
    "required": ["answer"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
HEADERS = {"authorization": f"Bearer {KEYS['bystander']}", "content-type": "application/json"}
# It stands for a machine elsewhere, which waits for no processor of the server's.
NICENESS = -5
FAULTS = (OSError, HTTPException, RuntimeError, ValueError, KeyError)


@dataclass
class Seen:
    """What a bystander saw in one stretch of time."""

    first_s: list[float] = field(default_factory=list)
    json_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # in words: an error is no wrong answer
    wrong: list[str] = field(default_factory=list)

    @property
    def median_first_s(self) -> float:
        """Seconds to the first token."""
        return statistics.median(self.first_s) if self.first_s else float("inf")

    @property
    def median_json_s(self) -> float:
        """Seconds to a whole answer in JSON."""
        return statistics.median(self.json_s) if self.json_s else float("inf")

    @property
    def worst_first_s(self) -> float:
        """The longest wait for a first token."""
        return max(self.first_s, default=float("inf"))

    @property
    def health_p99_s(self) -> float:
        """The 99th percentile of /health."""
        times = sorted(self.health_s)
        return times[min(len(times) - 1, int(0.99 * len(times)))] if times else float("inf")


class Bystander:
    """The process, seen from the siege."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "benchmarks.siege.bystander", url]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def turn(self) -> Seen:
        """What was seen since the last turn."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return Seen(**json.loads(self._process.stdout.readline()))

    def stop(self) -> None:
        """End."""
        self._process.communicate()


class Watcher:
    """Asks on two threads, for ever. The first answers to its questions are the right ones."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._right = {question: self._ask(question)[0] for question in QUESTIONS}
        self._form()
        self._seen = Seen()
        for work in (self._ask_and_fill, self._probe):
            threading.Thread(target=work, daemon=True).start()

    def turn(self) -> Seen:
        """What was seen since the last turn."""
        seen, self._seen = self._seen, Seen()
        return seen

    def _ask_and_fill(self) -> None:
        """One after the other: beside a form of its own a question would take either 60 or 110 ms."""
        while True:
            for question in QUESTIONS:
                self._talk(question)
                time.sleep(0.05)
            self._fill_form()
            time.sleep(0.05)

    def _talk(self, question: str) -> None:
        try:
            text, first_s = self._ask(question)
        except FAULTS as error:
            self._seen.failed.append(f"{type(error).__name__}: {error}"[:200])
            return
        self._seen.first_s.append(first_s)
        if text != self._right[question]:
            self._seen.wrong.append(f"{question!r}: {text!r}")

    def _ask(self, question: str) -> tuple[str, float]:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 4}
        body |= {"stream": True, "reasoning": {"enabled": False}}
        started_at, first_s, text = time.monotonic(), 0.0, ""
        for piece in self._pieces(body):
            first_s = first_s or time.monotonic() - started_at
            text += piece
        return text, first_s

    def _pieces(self, body: dict[str, Any]) -> Iterator[str]:
        with closing(HTTPConnection(self._host, timeout=60)) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(body), HEADERS)
            response = client.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status} {response.read()[:150]!r}")
            for line in response:
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: {"):
                    chunk: dict[str, Any] = json.loads(line[6:])
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    yield from (text for one in chunk["choices"] if (text := one["delta"].get("content")))
            raise RuntimeError("the stream broke off")

    def _fill_form(self) -> None:
        started_at = time.monotonic()
        try:
            text = self._form()
        except FAULTS as error:
            self._seen.failed.append(f"form: {type(error).__name__}: {error}"[:200])
            return
        self._seen.json_s.append(time.monotonic() - started_at)
        try:
            assert len(json.loads(text)["answer"]) <= 12
        except (ValueError, KeyError, TypeError, AssertionError):
            self._seen.wrong.append(f"form: {text!r}")

    def _form(self) -> str:
        body = {"messages": [{"role": "user", "content": "Fill the form."}], "temperature": 0}
        body |= {"response_format": FORM, "reasoning": {"enabled": False}, "max_tokens": 400}
        with closing(HTTPConnection(self._host, timeout=60)) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(body), HEADERS)
            answer = json.load(response := client.getresponse())
        if response.status != 200 or "error" in answer:
            raise RuntimeError(str(answer)[:150])
        return str(answer["choices"][0]["message"]["content"])

    def _probe(self) -> None:
        while True:
            time.sleep(0.05)
            started_at = time.monotonic()
            try:
                with closing(HTTPConnection(self._host, timeout=10)) as client:
                    client.request("GET", "/health")
                    client.getresponse().read()
            except FAULTS as error:
                self._seen.failed.append(f"health: {type(error).__name__}")
            self._seen.health_s.append(time.monotonic() - started_at)


def main() -> None:
    """Watches, and tells what it saw for each line that comes."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    watcher = Watcher(sys.argv[1])
    for _ in sys.stdin:
        print(json.dumps(asdict(watcher.turn())), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
