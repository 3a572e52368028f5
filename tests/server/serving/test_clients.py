"""The fleet's clients, unmodified but for the base URL, over a socket against Pocket: all scenarios of each.

The forms differ, see the talks in `clients/` and `clients/node/`. `lacks` names what a client cannot say.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.grids import few
from tests.server.serving.clients.common import NUM_TOP
from tests.server.serving.running import ROOT, Server

TALKS = Path(__file__).parent / "clients"
HERE = Path(sys.executable)
# Clients that are large, or want other versions than those of the tests, live in an environment of their own.
APART = Path(sys.prefix) / "clients" / "bin" / "python"
# Each takes seconds to import; all at once would time each other out.
NUM_AT_ONCE = 4
TALK_TIMEOUT_S = 600
NODE_IS_ABSENT = "there is no node, or no npm with which `make test` installs node's clients"


@dataclass(frozen=True)
class Client:
    """A client: its environment, the name of its talk with words for it, and features it does not have."""

    python: Path | None
    talk: str
    words: tuple[str, ...] = ()
    lacks: frozenset[str] = frozenset()

    @property
    def absence(self) -> str | None:
        """Why it cannot talk here; None where it can."""
        if self.python is None:
            is_here = which("node") and (TALKS / "node" / "node_modules").exists()
            return None if is_here else NODE_IS_ABSENT
        return None if self.python.exists() else "`make test` puts these clients into .venv/clients"

    def talk_with(self, url: str) -> dict[str, Any]:
        """What it heard, by scenario."""
        module = f"tests.server.serving.clients.{self.talk}"
        command = [self.python, "-m", module] if self.python else ["node", f"{self.talk}.mjs"]
        done = subprocess.run(
            [*map(str, command), url, *self.words],
            cwd=ROOT if self.python else TALKS / "node",
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # it would ask the network for prices
            text=True, capture_output=True, timeout=TALK_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        heard: dict[str, Any] = json.loads(done.stdout)
        return heard


SCORES = frozenset(["scores"])
CLIENTS = {
    "openai-python": Client(HERE, "openai_talk"),
    "openai-python, Responses": Client(HERE, "responses_talk"),
    "anthropic-python": Client(HERE, "anthropic_talk", lacks=SCORES),
    "openrouter 1.x": Client(HERE, "openrouter_talk"),
    "openrouter 1.x, Responses": Client(HERE, "openrouter_responses_talk"),
    "pydantic-ai": Client(HERE, "pydantic_ai_talk"),
    "openrouter 0.11": Client(APART, "openrouter_talk"),
    "langchain-openrouter": Client(APART, "langchain_talk"),
    "langchain-openai": Client(APART, "langchain_openai_talk", lacks=frozenset(["thought"])),
    "litellm": Client(APART, "litellm_talk"),
    "openai-agents": Client(APART, "openai_agents_talk"),
    "openai-node": Client(None, "openai_talk"),
    "openai-node, Responses": Client(None, "responses_talk"),
    "@anthropic-ai/sdk": Client(None, "anthropic_talk", lacks=SCORES),
    "@openrouter/sdk": Client(None, "openrouter_talk"),
    "@openrouter/agent": Client(None, "openrouter_agent_talk", lacks=frozenset(["scores", "cancel"])),
    "AI SDK, openai-compatible": Client(None, "ai_sdk_talk", ("openai-compatible",), SCORES),
    "AI SDK, openai": Client(None, "ai_sdk_talk", ("openai",), SCORES),
    "AI SDK, anthropic": Client(None, "ai_sdk_talk", ("anthropic",), SCORES),
    "@openrouter/ai-sdk-provider": Client(None, "ai_sdk_talk", ("openrouter",), SCORES),
}

# Who talks in `make test`, one for each kind: OpenAI's and Anthropic's shapes, the fleet's client, and node.
KEPT = frozenset(["openai-python", "anthropic-python", "openrouter 1.x", "openai-node"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]

Talks = dict[str, Future[dict[str, Any]]]


def that_have(feature: str) -> pytest.MarkDecorator:
    """For every client with this feature."""
    names = [name for name, client in CLIENTS.items() if feature not in client.lacks]
    return pytest.mark.parametrize("client", few(names, KEPT.intersection(names)), indirect=True)


@pytest.fixture(scope="module")
def talks(server: Server, request: pytest.FixtureRequest) -> Iterator[Talks]:
    """All clients that the chosen tests ask for; some of them talk at the same time."""
    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {item.callspec.params["client"] for item in ours}
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        yield {
            name: pool.submit(client.talk_with, server.url)
            for name, client in CLIENTS.items()
            if client.absence is None and name in names
        }


@pytest.fixture
def client(talks: Talks, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one of them heard."""
    if absence := CLIENTS[request.param].absence:
        pytest.skip(absence)
    return talks[request.param].result()


@that_have("chat")
@pytest.mark.parametrize("scenario", ["chat", "stream"])
def test_it_chats(client: dict[str, Any], scenario: str) -> None:
    num_prompt, num_answer, num_total = client[scenario]["tokens"]
    assert "42" in client[scenario]["text"]
    assert min(num_prompt, num_answer) > 5
    assert num_prompt + num_answer == num_total


@that_have("chat")
def test_it_hears_the_same_whole_and_streamed(client: dict[str, Any]) -> None:
    assert client["chat"]["text"] == client["stream"]["text"]


@that_have("tools")
def test_it_goes_round_with_tools_side_by_side(client: dict[str, Any]) -> None:
    assert client["tools"]["calls"] == [{"city": "Oslo"}, {"city": "Madrid"}]
    assert client["tools"]["text"]


@that_have("thought")
def test_it_hears_a_thought_unless_it_wants_none(client: dict[str, Any]) -> None:
    assert "42" in client["chat"]["thought"]
    assert client["no_thought"] is None


@that_have("schema")
def test_it_gets_what_its_schema_says(client: dict[str, Any]) -> None:
    answer = client["json_schema"]
    assert answer.keys() == {"city", "is_sunny"}
    assert answer["city"] in ("Oslo", "Rome")
    assert answer["is_sunny"] in (True, False)


@that_have("scores")
def test_it_reads_log_probabilities(client: dict[str, Any]) -> None:
    answer = client["chat"]
    assert bytes(answer["scored"]).decode() == answer["text"]
    assert max(answer["logprobs"]) <= 0
    assert set(answer["num_top"]) == {NUM_TOP}


@that_have("error")
def test_it_says_what_was_wrong(client: dict[str, Any]) -> None:
    assert "temperature" in client["error"] or "top_p" in client["error"]


@that_have("cancel")
def test_it_cancels_by_leaving(client: dict[str, Any], server: Server) -> None:
    deadline = time.monotonic() + 10
    while True:
        found = httpx.get(f"{server.url}/api/v1/generation", params={"id": client["cancel"]})
        if found.status_code == 200:
            break
        assert time.monotonic() < deadline, found.text
        time.sleep(0.05)
    assert found.json()["data"]["cancelled"] is True
