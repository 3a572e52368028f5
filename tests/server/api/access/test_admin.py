"""What only an admin may do, and what everybody else sees of it; what a restart keeps."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from config.errors import UsageError
from server.api.access.guard import Access, is_loopback
from server.api.access.keys import KeyRing, read_keys
from server.api.access.quotas import RATE_HEADERS
from server.api.access.receipts import Ledger
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from tests.server.api.conftest import local_client
from tests.server.api.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ACTS: dict[str, dict[str, Any]] = {
    "/v1/cache/clear": {},
    "/api/v1/cache/pin": CHAT,
    "/cache/unpin": CHAT,
    "/v1/memory/plan": {"ram_budget": "1G"},
    "/v1/engine/start": {},
}
KEYS = """\
root: sk-0 admin
alice: sk-1 requests/day=5 tokens/minute=9000
bob: sk-2
sk-3 admin cache_group=fleet
"""
GENERATED = re.compile(r"gen-\d+-[0-9a-f]+|(resp|msg|call|rs|fc)_[0-9a-f]+")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines of the server; the client logs its requests, too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("server")]


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    file.chmod(0o600)
    return read_keys(None, file)


@pytest.mark.parametrize("path", ACTS)
def test_an_act_takes_an_admins_key_and_leaves_a_line(
    service: Service, engine: ScriptedEngine, ring: KeyRing, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = local_client(make_app(service, Access(ring)))
    caplog.set_level(logging.INFO)
    for key in ("sk-1", "sk-2"):
        refused = client.post(path, json=ACTS[path], headers=bearer(key))
        assert refused.status_code == 403
        assert "admin" in refused.json()["error"]["message"]
    assert not engine.administered
    assert not engine.replanned
    assert not [line for line in said(caplog) if line.startswith("admin:")]
    assert client.post(path, json=ACTS[path], headers=bearer("sk-0")).status_code == 202
    [line] = [text for text in said(caplog) if text.startswith("admin:")]
    assert all(part in line for part in (path, "'root'", "127.0.0.1"))
    assert "sk-0" not in line


def test_counts_of_the_cache_are_an_admins_and_pins_those_of_its_group(
    service: Service, engine: ScriptedEngine, ring: KeyRing
) -> None:
    client = local_client(make_app(service, Access(ring)))
    status = [client.get("/v1/cache/stats", headers=bearer(f"sk-{n}")).status_code for n in range(4)]
    assert status == [200, 403, 403, 200]
    client.post("/v1/cache/pin", json=CHAT, headers=bearer("sk-3"))
    assert engine.administered[-1].cache_group == "fleet"


@pytest.mark.parametrize(
    ("host", "name", "headers", "status"),
    [
        ("127.0.0.1", "localhost", {}, 202),
        ("127.8.9.1", "127.0.0.1:8080", {}, 202),
        ("::1", "[::1]:8080", {}, 202),
        ("::ffff:127.0.0.1", "localhost", {}, 202),
        ("192.168.1.9", "localhost", {}, 403),
        ("::ffff:192.168.1.9", "localhost", {}, 403),
        ("testclient", "localhost", {}, 403),
        ("127.0.0.1", "evil.example", {}, 403),
        ("127.0.0.1", "localhost", {"X-Forwarded-For": "203.0.113.5"}, 403),
        ("127.0.0.1", "localhost", {"Forwarded": "for=203.0.113.5"}, 403),
        ("127.0.0.1", "localhost", {"X-Real-IP": "127.0.0.1"}, 403),
    ],
)
def test_without_keys_clients_of_this_machine_are_admins(
    service: Service, engine: ScriptedEngine, host: str, name: str, headers: dict[str, str], status: int
) -> None:
    client = TestClient(make_app(service), f"http://{name}", client=(host, 50000))
    assert client.post("/v1/cache/clear", json={}, headers=headers).status_code == status
    assert len(engine.administered) == (status == 202)


@pytest.mark.parametrize("path", ACTS)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "Application/JSON; charset=utf-8", "Origin": "http://localhost:8080"}, 202),
    ],
)
@pytest.mark.parametrize("key", ["", "sk-0"])
def test_a_web_page_can_do_nothing_in_an_admins_name(
    service: Service, ring: KeyRing, path: str, headers: dict[str, str], status: int, key: str
) -> None:
    access = Access(ring if key else KeyRing(), cors_origins=("*",))
    given = headers | (bearer(key) if key else {})
    assert (
        local_client(make_app(service, access)).post(path, json=ACTS[path], headers=given).status_code
        == status
    )


@pytest.mark.parametrize("host", ["", "localhost.evil", "128.0.0.1", "::2", "fe80::1", "1270.0.0.1"])
def test_what_is_not_this_machine(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.slow
def test_credits_are_those_of_the_key_and_an_admin_sees_all(
    engine: ScriptedEngine, dialect: Dialect, ring: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"))
    client = TestClient(make_app(service, Access(ring)))
    ids = {}
    for key in ("sk-1", "sk-1", "sk-2", "sk-3"):
        ids[key] = client.post("/v1/chat/completions", json=CHAT, headers=bearer(key)).json()["id"]

    def cost(key: str) -> float:
        return float(client.get("/v1/credits", headers=bearer(key)).json()["data"]["openrouter_cost"])

    one = cost("sk-2")
    assert one > 0
    assert [cost(key) for key in ("sk-0", "sk-1", "sk-3")] == pytest.approx([4 * one, 2 * one, 4 * one])
    caplog.set_level(logging.INFO)
    for key, status in (("sk-0", 200), ("sk-2", 404), ("sk-1", 200)):
        assert client.get(f"/v1/generation?id={ids['sk-1']}", headers=bearer(key)).status_code == status
    assert [text for text in caplog.messages if text.startswith("admin:") and "'root'" in text]


def test_no_hash_of_a_key_is_shown(service: Service, ring: KeyRing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for access in (Access(ring), Access()):
        client = local_client(make_app(service, access))
        for key in ("sk-1", "sk-3"):
            body = CHAT | {"user": "u", "session_id": "s", "stream": False}
            answer = client.post("/v1/chat/completions", json=body, headers=bearer(key))
            own = answer.json()["id"]
            pages = [f"generation?id={own}", f"cache/explain?id={own}", "key", "credits"]
            told = [client.get(f"/v1/{page}", headers=bearer(key)).text for page in pages]
            shown = [GENERATED.sub("", text) for text in (answer.text, *told, *said(caplog))]
            assert not [text for text in shown if re.search(r"[0-9a-f]{12}", text) or key in text]


def test_a_restart_forgets_no_quota_receipt_or_saving(
    engine: ScriptedEngine, dialect: Dialect, ring: KeyRing, tmp_path: Path
) -> None:
    def start() -> tuple[Ledger, TestClient]:
        ledger = Ledger(tmp_path / "made" / "here")
        service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"), ledger)
        return ledger, TestClient(make_app(service, Access(ring)))

    pages = ["credits", "key"]
    ledger, client = start()
    asked = [client.post("/v1/chat/completions", json=CHAT, headers=bearer("sk-1")) for _ in range(3)]
    pages += [f"generation?id={answer.json()['id']}" for answer in asked]
    before = [client.get(f"/v1/{page}", headers=bearer("sk-1")).json() for page in pages]
    ledger.close_file()
    ledger, client = start()
    assert [client.get(f"/v1/{page}", headers=bearer("sk-1")).json() for page in pages] == before
    assert client.get(f"/v1/{pages[-1]}", headers=bearer("sk-2")).status_code == 404
    last = [client.post("/v1/chat/completions", json=CHAT, headers=bearer("sk-1")) for _ in range(3)]
    assert [answer.status_code for answer in last] == [200, 200, 429]
    ledger.close_file()
    for path in (tmp_path / "made" / "here").iterdir():
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"no database at all " * 99, b"", None])
def test_a_damaged_file_of_accounts_costs_what_was_in_it(
    engine: ScriptedEngine, dialect: Dialect, tmp_path: Path, damage: bytes | None
) -> None:
    if damage is None:
        (tmp_path / "accounts.sqlite3").mkdir()
    else:
        (tmp_path / "accounts.sqlite3").write_bytes(damage)
    ledger = Ledger(tmp_path)
    client = local_client(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2"), ledger)))
    own = client.post("/v1/chat/completions", json=CHAT).json()["id"]
    assert client.get(f"/v1/generation?id={own}").status_code == 200
    ledger.close_file()


def test_answers_say_what_is_left_of_a_quota(engine: ScriptedEngine, dialect: Dialect, ring: KeyRing) -> None:
    client = TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2")), Access(ring)))
    left = []
    for stream in (False, True, False, False, False, False):
        answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=bearer("sk-1"))
        assert set(RATE_HEADERS) <= set(answer.headers)
        left.append(int(answer.headers["x-ratelimit-remaining-requests"]))
    assert answer.status_code == 429
    assert left == [4, 3, 2, 1, 0, 0]
    assert answer.headers["x-ratelimit-limit-requests"] == "5"
    assert answer.headers["x-ratelimit-limit-tokens"] == "9000"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 9000
    assert re.fullmatch(r"\d+s", answer.headers["x-ratelimit-reset-requests"])
    free = client.post("/v1/chat/completions", json=CHAT, headers=bearer("sk-2"))
    assert not set(RATE_HEADERS) & set(free.headers), "no limit, no header"


@pytest.mark.parametrize(("mode", "warns"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1), (0o660, 1)])
def test_a_key_file_that_others_may_read_is_a_warning(
    tmp_path: Path, mode: int, warns: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-1")
    file.chmod(mode)
    read_keys(None, file)
    assert len(caplog.messages) == warns
    assert all("chmod 600" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "line",
    [
        "alice: admin",
        "cache_group=x",
        "alice: sk-1 cache_group=",
        "alice: sk-1 cache_group=a cache_group=b",
        "alice: sk-1 cache_group=a:b",
        "alice: sk-1 admin=yes",
        "alice: sk-1 Admin",
        "bob: sk-9",
    ],
)
def test_a_line_that_says_nothing_clear_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"sk-9\n{line}\n")
    with pytest.raises(UsageError, match="keys: line 2: "):
        read_keys(None, file)
