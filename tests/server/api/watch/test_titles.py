"""A stock fleet that sends only titles gets the passes and steps that users of those names get."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
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
from server.link.messages import Command, Generate, ModelInfo
from tests.server.api.conftest import running_app
from tests.server.in_process import CONTEXT, SMALL, VOCAB, running_engine
from tests.tiny_glm import make_weights
from tests.tiny_model import make_model

AGENTS, TURNS = 6, 2


class Counted:
    """The model; notes how many sequences each pass and step had."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        self.sizes.append(len(spans))
        result: mx.array = yield from self._model.forward(tokens, spans)
        return result


class Together:
    """The engine's inbox, which takes requests six at a time: none is there before the others."""

    def __init__(self, inbox: SimpleQueue[Command]) -> None:
        self._inbox = inbox
        self._held: list[Generate] = []
        self.agents: set[str] = set()

    def put(self, command: Command) -> None:
        """As the inbox, but a turn's requests wait for the last of them."""
        if not isinstance(command, Generate):
            self._inbox.put(command)
            return
        self.agents.add(command.agent)
        self._held.append(command)
        if len(self._held) == AGENTS:
            for request in self._held:
                self._inbox.put(request)
            self._held.clear()


@pytest.fixture
def dialect(tokenizer: Tokenizer) -> Dialect:
    return Dialect(tokenizer, ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours"))


def sizes_of(way: str, dialect: Dialect, tokenizer_folder: Path) -> tuple[set[str], list[int]]:
    """The agents that the engine saw, and how many sequences each pass and step had."""
    model = Counted(make_model(SMALL, make_weights(SMALL, 3)))
    limits = Limits(agent_inflight=1, pass_rows=2048)
    with running_engine(Backend(model, ModelInfo(VOCAB, CONTEXT), limits=limits), tokenizer_folder) as engine:
        engine.inbox = together = Together(engine.inbox)  # type: ignore[assignment]
        service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"))
        with running_app(make_app(service)) as url, ThreadPoolExecutor(AGENTS) as pool:
            list(pool.map(lambda number: talk(url, way, number), range(AGENTS)))
    return together.agents, model.sizes


def talk(url: str, way: str, number: int) -> None:
    title = "fleet" if way == "one title" else f"agent {number}"
    named: dict[str, Any] = {"user": f"agent {number}"} if way == "user" else {}
    history: list[Any] = [{"role": "system", "content": "You are terse."}]
    headers = {} if way == "user" else {"X-Title": title}
    with openai.OpenAI(base_url=url + "/v1", api_key="k", default_headers=headers) as api:
        for turn in range(TURNS):
            history += [{"role": "user", "content": f"task {number}, turn {turn}"}]
            answer = api.chat.completions.create(
                model="z-ai/glm-5.2", messages=history, max_tokens=12, temperature=0,
                logit_bias={str(end): -100 for end in (319, 318, 317, 316)}, **named,
            )  # fmt: skip
            history += [{"role": "assistant", "content": answer.choices[0].message.content or "-"}]


def test_titles_share_passes_and_steps_as_users_do(dialect: Dialect, tokenizer_folder: Path) -> None:
    named, expected = sizes_of("user", dialect, tokenizer_folder)
    for way in ("titles", "one title"):
        agents, sizes = sizes_of(way, dialect, tokenizer_folder)
        assert len(agents) == len(named) == AGENTS, way
        assert sizes == expected, f"{way}: the same passes and steps"
    assert max(expected) == AGENTS, "with one place an agent, all six go forward together"
