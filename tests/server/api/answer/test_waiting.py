"""What those who wait hear: at once, then again and again, and how many are before them."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.api.answer.answer import Answer, WaitingRequests
from server.api.service import Service
from server.glm.answer_parser import AnswerParser
from server.glm.tokenizer import Tokenizer
from server.link.messages import Generate, Progress, Queued, RequestEvent, Started
from tests.server.api.conftest import running_server
from tests.server.api.scripted import ScriptedEngine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
MESSAGES = CHAT | {"model": "z-ai/glm-5.2", "max_tokens": 9}
BODIES = [
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": "hello", "stream": True}),
    ("/v1/messages", MESSAGES | {"stream": True}),
    ("/v1/responses", {"input": "hello", "stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/messages", MESSAGES),
]


class SteppingEngine(ScriptedEngine):
    """Tells each request these places in the line, and then what a test puts into its queue."""

    def __init__(self, places: tuple[int, ...] = ()) -> None:
        super().__init__([])
        self.places = places
        self.events: dict[str, asyncio.Queue[RequestEvent]] = {}

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        queue = self.events.setdefault(request.request_id, asyncio.Queue())
        for place in self.places:
            yield Queued(request.request_id, place)
        while True:
            yield await queue.get()


def test_places_in_the_line_progress_and_then_silence(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine, line = SteppingEngine(), WaitingRequests()
        requests = [Generate(name, (1, 2, 3, 4), 5) for name in ("a", "b", "c")]
        answers = [
            Answer(engine, AnswerParser(tokenizer, one.token_ids), one, [], None, line) for one in requests
        ]

        async def read(answer: Answer) -> None:
            async for _ in answer.deltas():
                pass

        tasks = [asyncio.ensure_future(read(answer)) for answer in answers]
        await asyncio.sleep(0)
        assert [answer.progress for answer in answers] == ["queue=0", "queue=1", "queue=2"]
        for name, place in (("a", 2), ("b", 0), ("c", 1)):  # the engine's order is another
            engine.events[name].put_nowait(Queued(name, place))
        await asyncio.sleep(0.01)
        assert [answer.progress for answer in answers] == ["queue=2", "queue=0", "queue=1"]
        engine.events["b"].put_nowait(Started("b"))
        for name, place in (("a", 0), ("c", 1)):
            engine.events[name].put_nowait(Queued(name, place))
        engine.events["b"].put_nowait(Progress("b", 1, 4))
        await asyncio.sleep(0.01)
        assert [answer.progress for answer in answers] == ["queue=0", "prefill=1/4", "queue=1"]
        engine.events["b"].put_nowait(Progress("b", 2, 4))
        await asyncio.sleep(0.01)
        assert answers[1].progress.startswith("prefill=2/4 eta=")
        engine.events["b"].put_nowait(Queued("b", 0))
        await asyncio.sleep(0.01)
        assert answers[1].progress == "queue=0", "who gave its place to others waits again"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [line.num_before(name) for name in ("a", "b", "c")] == [None] * 3, "who hangs up waits no more"

    asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), BODIES[:4])
def test_every_stream_tells_how_far_it_has_come(service: Service, path: str, body: dict[str, Any]) -> None:
    engine = SteppingEngine(places=(3,))
    waiting = replace(service, engine=engine, line=WaitingRequests(), keepalive_s=0.05)
    with (
        running_server(waiting) as url,
        httpx.stream("POST", url + path, json=body, timeout=20) as response,
    ):
        assert ": OPENROUTER PROCESSING queue=3" in response.iter_lines()


def arrivals(url: str, path: str, body: dict[str, Any], for_s: float) -> list[float]:
    """When bytes came, in seconds after the request."""
    started_at, found = time.monotonic(), []
    with httpx.stream("POST", url + path, json=body, timeout=for_s + 20) as response:
        for part in response.iter_raw():
            found.append(time.monotonic() - started_at)
            assert part
            if found[-1] > for_s:
                break
    return found


def check_gaps(service: Service, blocked_s: float, gap_s: float, first_s: float) -> None:
    async def talk(url: str) -> list[list[float]]:
        waits = [asyncio.to_thread(arrivals, url, path, body, blocked_s) for path, body in BODIES]
        return await asyncio.gather(*waits)

    with running_server(service) as url:
        httpx.get(f"{url}/health")
        for (_, body), found in zip(BODIES, asyncio.run(talk(url)), strict=True):
            gaps = [later - earlier for earlier, later in zip([0.0, *found], found, strict=False)]
            assert max(gaps) <= gap_s, gaps
            assert found[-1] > blocked_s - gap_s
            if body.get("stream"):
                assert found[0] <= first_s


@pytest.mark.slow
def test_bytes_flow_while_the_engine_says_nothing(service: Service, engine: ScriptedEngine) -> None:
    engine.token_s = 30
    # a bound that a busy machine keeps, and that silence until the engine speaks would not
    check_gaps(replace(service, keepalive_s=0.1, patience_s=0.2), blocked_s=4, gap_s=3, first_s=3)


@pytest.mark.long
def test_a_byte_every_ten_seconds_while_the_engine_is_blocked_for_a_minute(
    engine: ScriptedEngine, service: Service
) -> None:
    engine.token_s = 90
    usual = Service(
        engine, service.dialect, service.names
    )  # as it is served: every 5 s, whole answers after 10
    check_gaps(usual, blocked_s=60, gap_s=10.5, first_s=0.5)
