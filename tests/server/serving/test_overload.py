"""Clients that read nothing, write slowly, hang on the line or come all at once: the rest is served."""

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from server.glm.tokenizer import Tokenizer
from server.link.supervisor import Deadlines
from tests.server.behind_http import Served, body, served
from tests.server.link.fake_worker import FATAL_TOKEN

NUM_IDLE = 1000


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Both ends of all connections are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * NUM_IDLE), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_two_hundred_at_once_on_a_line_of_sixty_four(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with served(tokenizer, "plain", max_queue=64) as server:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
                asked = [http.post("/v1/completions", json=body(1, 25)) for _ in range(200)]
                answers = await asyncio.gather(*asked)
                outcomes = Counter(answer.status_code for answer in answers)
                assert set(outcomes) == {200, 503}
                assert 64 <= outcomes[200] < 200
                for answer in answers:
                    if answer.status_code == 503:
                        assert 1 <= int(answer.headers["retry-after"]) <= 120
                        assert answer.headers["x-should-retry"] == "true"
                        assert answer.json()["error"]["metadata"]["error_type"] == "provider_overloaded"
                assert (await http.post("/v1/completions", json=body(1, 2))).status_code == 200

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.usefixtures("many_descriptors")
def test_clients_that_do_not_read_do_not_write_or_do_nothing(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with served(tokenizer, "roomy") as server:
            idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(NUM_IDLE)]
            deaf = [await _ask_and_do_not_read(server) for _ in range(8)]
            slow = asyncio.ensure_future(_write_a_byte_at_a_time(server))
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
                for _ in range(5):
                    answer = await http.post("/v1/completions", json=body(1, 5))
                    assert answer.json()["usage"]["completion_tokens"] == 5
                assert (await http.get("/health")).status_code == 200
                while server.engine._requests:  # the engine has done with those that do not read
                    await asyncio.sleep(0.01)
            slow.cancel()
            for _, writer in [*idle, *deaf]:
                writer.close()
            await asyncio.gather(slow, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_frozen_step_turns_health_to_503_and_heals(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with (
            served(tokenizer, "freezing", deadlines=Deadlines(step_s=1.0)) as server,
            httpx.AsyncClient(base_url=server.url, timeout=30) as http,
        ):
            frozen = await http.post("/v1/completions", json=body(FATAL_TOKEN, 5))
            assert frozen.status_code == 503
            assert "no sign of life" in frozen.json()["error"]["message"]
            health = await http.get("/health")
            assert health.status_code == 503
            assert "no sign of life" in health.json()["reason"]
            while (await http.get("/health")).status_code != 200:
                await asyncio.sleep(0.05)
            assert (await http.post("/v1/completions", json=body(1, 5))).status_code == 200

    asyncio.run(scenario())


async def _ask_and_do_not_read(server: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Half a megabyte of events, into buffers of some kilobytes."""
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    end.connect(("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=end, limit=1)
    raw = json.dumps(body(1, 1500, stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)
    await writer.drain()
    return reader, writer


async def _write_a_byte_at_a_time(server: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for byte in (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n" + b" " * 999
        ):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
    finally:
        writer.close()
