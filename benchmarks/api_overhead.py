"""What the HTTP side costs: CPU time of the server per streamed token, and the time to the first byte.

    python -m benchmarks.api_overhead [--tokens 1000] [--rounds 15] [--profile]

The server runs in a process of its own, the whole stack of it, over an engine that says a written text as
fast as it is asked, in tokens of Pocket's tokenizer. The CPU time is that process's own, from before the
request to the last byte of the answer, divided by the tokens. Dialects take turns; medians with the lowest
and highest.
"""

import argparse
import asyncio
import cProfile
import multiprocessing
import pstats
import socket
import statistics
import threading
import time
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from typing import Any

import httpx
import uvicorn

from server.api.app import make_app
from server.api.connection import HttpConnection
from server.api.request.model_names import ModelNames
from server.api.service import Service
from server.commands.checkpoint import POCKET
from server.commands.serve import load_dialect
from server.link.engine_protocol import EngineStatus
from server.link.messages import (
    Administer,
    Administered,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Progress,
    Replan,
    RequestEvent,
    Token,
    TokenScore,
    Usage,
)

TEXT = "The quick brown fox looks at the lazy dog, says hello, and goes home again; nobody minds. "
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/api/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    "messages": (
        "/v1/messages",
        {"messages": [{"role": "user", "content": "hello"}], "model": "z-ai/glm-5.2"},
    ),
    "responses": ("/v1/responses", {"input": "hello"}),
    "completions": ("/v1/completions", {"prompt": "hello"}),
}


class WrittenEngine:
    """Says its script; gives way to the other tasks after each token, as messages from a pipe do."""

    def __init__(self, script: list[int]) -> None:
        self._script = script

    @property
    def status(self) -> EngineStatus:
        return EngineStatus("ready", info=ModelInfo(154_880, 1_000_000))

    def health(self) -> EngineStatus:
        """It is well."""
        return self.status

    def reserve(self) -> None:
        """There is always room."""

    async def administer(self, command: Administer) -> Administered:
        """Nothing is saved."""
        return Administered(command.request_id)

    def cancel(self, request_id: str) -> None:
        """Nothing runs on."""

    def start_now(self) -> None:
        """It runs."""

    async def replan(self, command: Replan) -> Failed:
        """There is no plan."""
        return Failed(command.request_id, "request", "there is no plan here")

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        """The script, once."""
        name, num_prompt = request.request_id, len(request.token_ids)
        yield Progress(name, num_prompt, num_prompt)
        for token_id in self._script:
            await asyncio.sleep(0)
            yield Token(name, TokenScore(token_id, -0.5))
        yield Finished(name, "length", Usage(num_prompt, len(self._script)))


def run_server(port: int, num_tokens: int, asked: Connection, profiles: bool) -> None:
    """The server's process: serves, and tells its CPU time whenever it is asked."""
    dialect = load_dialect(POCKET)
    script = dialect.tokenizer.encode(TEXT * (num_tokens // 10))[:num_tokens]
    engine = WrittenEngine(script)
    app = make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2", "any")))
    server = uvicorn.Server(
        uvicorn.Config(app, http=HttpConnection, log_config=None, access_log=False, lifespan="off", port=port)
    )
    profile = cProfile.Profile()

    def answer() -> None:
        while asked.recv() == "cpu":
            asked.send(time.process_time())
        server.should_exit = True

    threading.Thread(target=answer, daemon=True).start()
    if profiles:
        profile.enable()
    server.run()
    if profiles:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)


def measure(num_tokens: int, num_rounds: int, profiles: bool) -> dict[str, tuple[list[float], list[float]]]:
    """For each dialect the CPU time per token in microseconds, and the time to the first byte in ms."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_server, args=(port, num_tokens, there, profiles))
    process.start()
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in BODIES}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait(client)
            for number in range(num_rounds + 1):
                for name in ["chat"] if profiles else BODIES:
                    cpu, first = _one(client, here, name, num_tokens)
                    if number:  # the first round warms up
                        found[name][0].append(cpu / num_tokens * 1e6)
                        found[name][1].append(first * 1e3)
    finally:
        here.send("end")
        process.join()
    return found


def _wait(client: httpx.Client) -> None:
    while True:
        try:
            client.get("/health")
            return
        except httpx.ConnectError:
            time.sleep(0.05)


def _one(client: httpx.Client, server: Connection, name: str, num_tokens: int) -> tuple[float, float]:
    path, body = BODIES[name]
    limit = {"responses": "max_output_tokens"}.get(name, "max_tokens")
    server.send("cpu")
    before = server.recv()
    started_at = time.perf_counter()
    with client.stream("POST", path, json=body | {"stream": True, limit: num_tokens}) as response:
        parts = response.iter_raw()
        next(parts)
        first = time.perf_counter() - started_at
        for _ in parts:
            pass
    server.send("cpu")
    return server.recv() - before, first


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1000, help="tokens in an answer")
    parser.add_argument("--rounds", type=int, default=15, help="answers of each dialect")
    parser.add_argument(
        "--profile", action="store_true", help="profile the server on chat completions instead"
    )
    arguments = parser.parse_args()
    found = measure(arguments.tokens, arguments.rounds, arguments.profile)
    for name, (cpu, first) in found.items():
        if cpu and not arguments.profile:
            print(f"{name:12} {_spread(cpu)} us of CPU per token   first byte after {_spread(first)} ms")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
