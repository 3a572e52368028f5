"""Keys are walls: what one key has sent changes no field of what another one is answered."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.access.guard import Access
from server.api.access.keys import KeyRing, read_keys
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule.limits import Limits
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.messages import ModelInfo
from tests.server.in_process import CONTEXT, SMALL, VOCAB, running_engine
from tests.tiny_glm import make_weights
from tests.tiny_model import make_model

KEYS = """\
alice: sk-a
bob: sk-b
alice: sk-a2  # her new key
carol: sk-c cache_group=fleet
dave: sk-d cache_group=fleet
erin: sk-e cache_group=alice
sk-f
sk-g
"""
# Each differs from the others from its first words on, and is several blocks of 64 tokens.
SECRETS = [f"{word} is the name of the project, and it is told to nobody. " * 6
           for word in ("Falcon", "Osprey", "Merlin", "Harrier")]  # fmt: skip
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
# What differs between any two answers.
OWN = {
    "id",
    "created",
    "created_at",
    "completed_at",
    "latency",
    "generation_time",
    "compared_with",
    "item_id",
}


@contextmanager
def serving(tokenizer: Tokenizer, folder: Path, ring: KeyRing) -> Iterator[TestClient]:
    backend = Backend(
        make_model(SMALL, make_weights(SMALL, 3)), ModelInfo(VOCAB, CONTEXT), limits=Limits(kv_tokens=CONTEXT)
    )
    template = ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours")
    with running_engine(backend, folder, SavedPrefixes(PrefixCache(bytes(32), 10**9))) as engine:
        service = Service(engine, Dialect(tokenizer, template), ModelNames("glm"), patience_s=None)
        yield TestClient(make_app(service, Access(ring)))


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEYS)
    file.chmod(0o600)
    return read_keys(None, file)


def bodies(path: str, system: str) -> dict[str, Any]:
    turn = [{"role": "user", "content": "hello"}]
    return {"temperature": 0, "model": "glm"} | {
        PATHS[0]: {"messages": [{"role": "system", "content": system}, *turn], "max_tokens": 4},
        PATHS[1]: {"prompt": system, "max_tokens": 4},
        PATHS[2]: {"system": system, "messages": turn, "max_tokens": 4},
        PATHS[3]: {"instructions": system, "input": "hello", "max_output_tokens": 4},
    }[path.removeprefix("/api")]


def ask(client: TestClient, key: str, path: str, system: str, **more: Any) -> Any:
    answer = client.post(path, json=bodies(path, system) | more, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer


def cached(client: TestClient, key: str, system: str) -> int:
    usage = ask(client, key, PATHS[0], system).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def without_own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_own(item) for name, item in value.items() if name not in OWN}
    if isinstance(value, str):
        return re.sub(r"gen-\d+-[0-9a-f]+", "", value)
    return [without_own(item) for item in value] if isinstance(value, list) else value


def all_that_bob_sees(client: TestClient, system: str) -> list[Any]:
    seen: list[Any] = []
    bob = {"Authorization": "Bearer sk-b"}
    for path in PATHS:
        answer = ask(client, "sk-b", path, system)
        headers = {name: text for name, text in answer.headers.items() if name != "x-generation-id"}
        seen += [without_own(answer.json()), without_own(headers)]
        own = answer.headers.get("x-generation-id", "")
        for page in (f"/v1/generation?id={own}", f"/v1/cache/explain?id={own}", "/v1/credits", "/v1/key"):
            seen.append(without_own(client.get(page, headers=bob).json()))
    streamed = ask(client, "sk-b", "/api" + PATHS[0], system + "!", stream=True)
    *_, usage, _done = (line for line in streamed.text.splitlines() if line)
    return [*seen, usage.partition('"usage"')[2]]


@pytest.mark.slow
def test_four_guesses_of_anothers_system_prompt_are_told_apart_by_no_field(
    tokenizer: Tokenizer, tokenizer_folder: Path, ring: KeyRing
) -> None:
    with serving(tokenizer, tokenizer_folder, ring) as client:
        fresh = [all_that_bob_sees(client, guess) for guess in SECRETS]
    with serving(tokenizer, tokenizer_folder, ring) as client:
        for path in PATHS:
            ask(client, "sk-a", path, SECRETS[2])
        assert cached(client, "sk-a", SECRETS[2]) > 64, "her own is found again"
        after = [all_that_bob_sees(client, guess) for guess in SECRETS]
    for told, other in zip(after, fresh, strict=True):
        for field, expected in zip(told, other, strict=True):
            assert field == expected


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ("sk-a", "sk-a2", True),  # a name keeps its cache when its key is another one
        ("sk-c", "sk-d", True),  # by choice
        ("sk-a", "sk-e", True),
        ("sk-e", "sk-a", True),
        ("sk-a", "sk-b", False),
        ("sk-c", "sk-b", False),
        ("sk-f", "sk-g", False),  # keys without a name are not one name
        ("sk-b", "sk-f", False),
    ],
)
def test_saved_prompts_are_shared_within_a_group(
    tokenizer: Tokenizer, tokenizer_folder: Path, ring: KeyRing, first: str, second: str, is_shared: bool
) -> None:
    with serving(tokenizer, tokenizer_folder, ring) as client:
        ask(client, first, PATHS[0], SECRETS[0])
        assert (cached(client, second, SECRETS[0]) > 64) == is_shared


def test_without_keys_all_share(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    with serving(tokenizer, tokenizer_folder, KeyRing()) as client:
        ask(client, "one", PATHS[0], SECRETS[0])
        assert cached(client, "two", SECRETS[0]) > 64


def test_the_place_of_a_key_without_a_name_is_not_its_identity(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-f\nsk-g\n")
    before = read_keys(None, file)
    file.write_text("sk-new\nsk-f\n")
    after = read_keys(None, file)
    old, new, moved = before.find("sk-f"), after.find("sk-new"), after.find("sk-f")
    assert old
    assert new
    assert moved
    assert old.name == new.name == "line 1"
    assert len({old.account, new.account}) == len({old.cache_group, new.cache_group}) == 2
    assert (moved.account, moved.cache_group) == (old.account, old.cache_group)


def test_what_is_anothers_is_not_there(tokenizer: Tokenizer, tokenizer_folder: Path, ring: KeyRing) -> None:
    with serving(tokenizer, tokenizer_folder, ring) as client:
        own = ask(client, "sk-a", PATHS[0], SECRETS[0]).headers["x-generation-id"]
        for page in ("generation", "cache/explain"):
            for key, status in (("sk-a", 200), ("sk-a2", 200), ("sk-b", 404), ("sk-e", 404), ("sk-f", 404)):
                answer = client.get(f"/v1/{page}?id={own}", headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status
            nowhere = client.get(f"/v1/{page}?id=gen-0", headers={"Authorization": "Bearer sk-b"})
            assert answer.json()["error"]["message"] == nowhere.json()["error"]["message"].replace(
                "gen-0", own
            )
