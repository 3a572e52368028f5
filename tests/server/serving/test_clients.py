"""The fleet's clients, unmodified but for the base URL, over a socket against Pocket: all scenarios of each.

All five have all features that are asked for here; only the forms differ, see the talks in `clients/`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from tests.server.serving.clients.common import NUM_TOP
from tests.server.serving.running import ROOT, Server

HERE = Path(sys.executable)
# langchain-openrouter pins OpenRouter's SDK below 1.0: both live in an environment of their own
OLD = Path(sys.prefix) / "langchain" / "bin" / "python"
TALKS = {
    "openai": (HERE, "openai_talk"),
    "openrouter 1.x": (HERE, "openrouter_talk"),
    "openrouter 0.11": (OLD, "openrouter_talk"),
    "langchain-openrouter": (OLD, "langchain_talk"),
    "pydantic-ai": (HERE, "pydantic_ai_talk"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]

Talks = dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def talks(server: Server) -> Iterator[Talks]:
    """All clients; they talk at the same time."""
    started = {
        client: subprocess.Popen(
            [python, "-m", f"tests.server.serving.clients.{module}", server.url],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for client, (python, module) in TALKS.items()
        if python.exists()
    }  # fmt: skip
    yield started
    for talk in started.values():
        talk.kill()


@pytest.fixture(scope="module", params=TALKS)
def client(talks: Talks, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one of them heard."""
    if request.param not in talks:
        pytest.skip("`make test` puts langchain beside the tests")
    talk = talks[request.param]
    said, complaints = talk.communicate(timeout=200)
    assert talk.returncode == 0, complaints[-2000:]
    result: dict[str, Any] = json.loads(said)
    return result


@pytest.mark.parametrize("scenario", ["chat", "stream"])
def test_it_chats(client: dict[str, Any], scenario: str) -> None:
    num_prompt, num_answer, num_total = client[scenario]["tokens"]
    assert "42" in client[scenario]["text"]
    assert min(num_prompt, num_answer) > 5
    assert num_prompt + num_answer == num_total


def test_it_hears_the_same_whole_and_streamed(client: dict[str, Any]) -> None:
    assert client["chat"]["text"] == client["stream"]["text"]


def test_it_goes_round_with_tools_side_by_side(client: dict[str, Any]) -> None:
    assert client["tools"]["calls"] == [{"city": "Oslo"}, {"city": "Madrid"}]
    assert client["tools"]["text"]


def test_it_hears_a_thought_unless_it_wants_none(client: dict[str, Any]) -> None:
    assert "42" in client["chat"]["thought"]
    assert client["no_thought"] is None


def test_it_gets_what_its_schema_says(client: dict[str, Any]) -> None:
    answer = client["json_schema"]
    assert answer.keys() == {"city", "is_sunny"}
    assert answer["city"] in ("Oslo", "Rome")
    assert answer["is_sunny"] in (True, False)


def test_it_reads_log_probabilities(client: dict[str, Any]) -> None:
    answer = client["chat"]
    assert bytes(answer["scored"]).decode() == answer["text"]
    assert max(answer["logprobs"]) <= 0
    assert set(answer["num_top"]) == {NUM_TOP}


def test_it_says_what_was_wrong(client: dict[str, Any]) -> None:
    assert "temperature" in client["error"]


def test_it_cancels_by_leaving(client: dict[str, Any], server: Server) -> None:
    deadline = time.monotonic() + 10
    while True:
        found = httpx.get(f"{server.url}/api/v1/generation", params={"id": client["cancel"]})
        if found.status_code == 200:
            break
        assert time.monotonic() < deadline, found.text
        time.sleep(0.05)
    assert found.json()["data"]["cancelled"] is True
