"""A stock fleet that sends only titles gets the passes and steps that users of those names get."""

import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest

from models.attention.attention import Span
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.messages import Generate, ModelInfo, RequestEvent
from tests.server.api.conftest import running_app
from tests.server.in_process import CONTEXT, SMALL, VOCAB, running_engine
from tests.tiny_glm import make_weights
from tests.tiny_model import make_model

AGENTS, TURNS = 6, 2


class Gated:
    """The model, which computes nothing of a turn until all agents have asked."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.num_asked = 0
        self.sizes: list[int] = []  # how many sequences each step or pass had
        self._num_gated = 0
        self._asked = threading.Condition()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        while self.num_asked % AGENTS:
            time.sleep(0.002)
        self.sizes.append(len(spans))
        result: mx.array = yield from self._model.forward(tokens, spans)
        return result


@pytest.fixture
def dialect(tokenizer: Tokenizer) -> Dialect:
    return Dialect(tokenizer, ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours"))


def sizes_of(way: str, dialect: Dialect, tokenizer_folder: Path) -> tuple[set[str], list[int]]:
    """The agents that the engine saw, and how many sequences each pass and step had."""
    model = Gated(make_model(SMALL, make_weights(SMALL, 3)))
    limits = Limits(agent_inflight=1, pass_rows=2048)
    seen: set[str] = set()
    with running_engine(Backend(model, ModelInfo(VOCAB, CONTEXT), limits=limits), tokenizer_folder) as engine:
        generate = engine.generate

        def noted(request: Generate) -> AsyncGenerator[RequestEvent, None]:
            seen.add(request.agent)
            model.num_asked += 1
            return generate(request)

        engine.generate = noted  # type: ignore[method-assign]
        service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"))
        with running_app(make_app(service)) as url, ThreadPoolExecutor(AGENTS) as pool:
            barrier = threading.Barrier(AGENTS)
            list(pool.map(lambda number: talk(url, way, number, barrier), range(AGENTS)))
    return seen, model.sizes


def talk(url: str, way: str, number: int, barrier: threading.Barrier) -> None:
    title = "fleet" if way == "one title" else f"agent {number}"
    named: dict[str, Any] = {"user": f"agent {number}"} if way == "user" else {}
    history: list[Any] = [{"role": "system", "content": "You are terse."}]
    headers = {} if way == "user" else {"X-Title": title}
    with openai.OpenAI(base_url=url + "/v1", api_key="k", default_headers=headers) as api:
        for turn in range(TURNS):
            barrier.wait()
            history += [{"role": "user", "content": f"task {number}, turn {turn}"}]
            answer = api.chat.completions.create(
                model="z-ai/glm-5.2", messages=history, max_tokens=12, temperature=0,
                logit_bias={str(end): -100 for end in (319, 318, 317, 316)}, **named,
            )  # fmt: skip
            history += [{"role": "assistant", "content": answer.choices[0].message.content or "-"}]


@pytest.mark.long  # its steps are as many as users' only where nothing else is at work
@pytest.mark.parametrize("way", ["titles", "one title"])
def test_titles_share_passes_and_steps_as_users_do(
    dialect: Dialect, tokenizer_folder: Path, way: str
) -> None:
    agents, sizes = sizes_of(way, dialect, tokenizer_folder)
    named, expected = sizes_of("user", dialect, tokenizer_folder)
    assert len(agents) == len(named) == AGENTS
    assert max(sizes) == max(expected) == AGENTS, "with one place an agent, all six go forward together"
    assert abs(len(sizes) - len(expected)) <= 0.1 * len(expected), (sizes, expected)
