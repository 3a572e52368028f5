"""A client that does no harm: what it is answered, and how long it waits, beside whatever others do."""

import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.siege.cage import KEYS

QUESTIONS = ["What is 17+25?", "What is 8+5?", "What is the capital of France?", "What is 31+44?"]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}},
    "required": ["answer"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
HEADERS = {"authorization": f"Bearer {KEYS['bystander']}"}


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
    """Asks on three threads until it is stopped. The first answers to its questions are the right ones."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._right: dict[str, str] = {}
        self._stopping = threading.Event()
        self._seen = Seen()
        self._threads = [threading.Thread(target=one) for one in (self._talk, self._fill_forms, self._probe)]

    def learn(self) -> None:
        """Note what is right, in peace."""
        with httpx.Client(headers=HEADERS, timeout=60) as client:
            for question in QUESTIONS:
                self._right[question], _ = self._ask(client, question)
            self._form(client)

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def turn(self) -> Seen:
        """What was seen since the last turn."""
        seen, self._seen = self._seen, Seen()
        return seen

    def _talk(self) -> None:
        number = 0
        while not self._stopping.wait(0.05):
            question = QUESTIONS[number % len(QUESTIONS)]
            number += 1
            try:
                with httpx.Client(headers=HEADERS, timeout=60) as client:
                    text, first_s = self._ask(client, question)
            except (httpx.HTTPError, RuntimeError) as error:
                self._seen.failed.append(f"{type(error).__name__}: {error}"[:200])
                continue
            self._seen.first_s.append(first_s)
            if text != self._right[question]:
                self._seen.wrong.append(f"{question!r}: {text!r}")

    def _ask(self, client: httpx.Client, question: str) -> tuple[str, float]:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        body |= {"stream": True, "reasoning": {"enabled": False}}
        started_at, first_s, text, is_done = time.monotonic(), 0.0, "", False
        with client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code} {response.read()[:150]!r}")
            for line in response.iter_lines():
                is_done = is_done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk: dict[str, Any] = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    first_s = first_s or (time.monotonic() - started_at if piece else 0.0)
                    text += piece
            if not is_done:
                raise RuntimeError("the stream broke off")
        return text, first_s

    def _fill_forms(self) -> None:
        with httpx.Client(headers=HEADERS, timeout=60) as client:
            while not self._stopping.wait(0.3):
                started_at = time.monotonic()
                try:
                    text = self._form(client)
                except (httpx.HTTPError, RuntimeError) as error:
                    self._seen.failed.append(f"form: {type(error).__name__}: {error}"[:200])
                    continue
                self._seen.json_s.append(time.monotonic() - started_at)
                try:
                    assert len(json.loads(text)["answer"]) <= 12
                except (ValueError, KeyError, TypeError, AssertionError):
                    self._seen.wrong.append(f"form: {text!r}")

    def _form(self, client: httpx.Client) -> str:
        body = {"messages": [{"role": "user", "content": "Fill the form."}], "temperature": 0}
        body |= {"response_format": FORM, "reasoning": {"enabled": False}, "max_tokens": 400}
        response = client.post(f"{self._url}/v1/chat/completions", json=body)
        answer = response.json()
        if response.status_code != 200 or "error" in answer:
            raise RuntimeError(str(answer)[:150])
        return str(answer["choices"][0]["message"]["content"])

    def _probe(self) -> None:
        while not self._stopping.wait(0.05):
            started_at = time.monotonic()
            try:
                httpx.get(f"{self._url}/health", timeout=10)
            except httpx.HTTPError as error:
                self._seen.failed.append(f"health: {type(error).__name__}")
            self._seen.health_s.append(time.monotonic() - started_at)
