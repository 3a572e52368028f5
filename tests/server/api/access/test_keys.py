"""Who gets in, and who is told to stay out."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from config.errors import UsageError
from config.settings import load_settings
from server.api.access.guard import Access
from server.api.access.keys import KeyRing, read_keys
from server.api.app import make_app
from server.api.service import Service
from server.commands.serve import make_access
from tests.server.api.conftest import local_client
from tests.server.api.scripted import ScriptedEngine

BODY = {"messages": [{"role": "user", "content": "hello"}]}
RING = [("alice", "sk-1"), ("bob", "sk-2")]


def make_client(service: Service, access: Access) -> TestClient:
    return TestClient(make_app(service, access))


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/key", "/nothing", "/openapi.json"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "sk-1"},
        {"Authorization": "Basic sk-1"},
        {"Authorization": "Bearer sk-1x"},
        {"X-Api-Key": "wrong"},
    ],
)
def test_without_a_right_key_nothing_is_told(service: Service, path: str, headers: dict[str, str]) -> None:
    response = make_client(service, Access(KeyRing(RING))).get(path, headers=headers)
    assert response.status_code == response.json()["error"]["code"] == 401
    assert response.json()["error"]["metadata"]["error_type"] == "authentication"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer sk-2"}, {"authorization": "bearer sk-2"}, {"X-Api-Key": "sk-2"}]
)
def test_with_a_right_key_everything_works(service: Service, headers: dict[str, str]) -> None:
    client = make_client(service, Access(KeyRing(RING)))
    assert client.post("/v1/chat/completions", json=BODY, headers=headers).status_code == 200
    assert client.get("/api/v1/key", headers=headers).json()["data"]["label"] == "bob"


def test_health_needs_no_key(service: Service) -> None:
    assert make_client(service, Access(KeyRing(RING))).get("/health").status_code == 200


def test_without_keys_any_bearer_is_accepted(client: TestClient) -> None:
    headers = {"Authorization": "Bearer sk-or-whatever"}
    assert client.post("/v1/chat/completions", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("192.168.1.5:8080", 200),
        ("mac.local", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(service: Service, host: str, status: int) -> None:
    access = make_access(load_settings({"allowed_hosts": "mac.local"}))
    response = make_client(service, access).get("/v1/models", headers={"Host": host})
    assert response.status_code == status


def test_with_keys_the_name_does_not_matter(service: Service) -> None:
    access = make_access(load_settings({"api_key": "sk-1"}))
    headers = {"Host": "glm.example", "Authorization": "Bearer sk-1"}
    assert make_client(service, access).get("/v1/models", headers=headers).status_code == 200


def test_web_pages_are_let_in_only_when_named(service: Service) -> None:
    preflight = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization, x-openrouter-title, anthropic-version"
    closed = make_client(service, Access(KeyRing(RING)))
    response = closed.options("/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in response.headers
    access = make_access(load_settings({"api_key": "k", "cors_origins": "https://ui.example"}))
    response = make_client(service, access).options("/v1/chat/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://ui.example"


@pytest.mark.parametrize(
    "asked",
    [
        "authorization, content-type, x-stainless-lang, x-stainless-os, x-stainless-retry-count",
        "openai-beta,openai-organization,openai-project",
        "x-client-name, x-some-agents-own, traceparent, helicone-auth",
        "X-Portkey-Virtual-Key",
        "idempotency-key, user-agent, anthropic-dangerous-direct-browser-access",
    ],
)
def test_a_page_that_is_let_in_may_send_any_headers_from_any_network(service: Service, asked: str) -> None:
    client = make_client(service, make_access(load_settings({"cors_origins": "https://ui.example"})))
    preflight = {
        "Origin": "https://ui.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
        "Access-Control-Request-Private-Network": "true",
    }
    response = client.options("/v1/responses", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-headers"] == asked
    assert response.headers["access-control-allow-private-network"] == "true"
    refused = client.options("/v1/responses", headers=preflight | {"Origin": "https://evil.example"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("http://localhost.evil.example:8080", 403),
        ("http://203.0.113.5", 403),
        ("null", 403),
        ("http://localhost:3000", 202),
        ("http://[::1]:3000", 202),
        ("http://192.168.1.5:8080", 202),
        ("http://mac.local", 202),
        ("https://ui.example", 202),
        ("vscode-webview://x", 202),
        ("", 202),
    ],
)
def test_a_page_that_does_not_ask_first_is_refused(
    service: Service, engine: ScriptedEngine, origin: str, status: int
) -> None:
    flags = {"allowed_hosts": "mac.local", "cors_origins": "https://ui.example"}
    headers = {"Host": "192.168.1.5:8080", "Content-Type": "application/json"} | (
        {"Origin": origin} if origin else {}
    )
    client = local_client(make_app(service, make_access(load_settings(flags))))
    assert client.post("/v1/cache/clear", headers=headers).status_code == status
    assert len(engine.administered) == (status == 202)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac.local"])
def test_listening_to_others_takes_a_key_or_the_word_insecure(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key-file"):
        make_access(load_settings({"host": host}))
    make_access(load_settings({"host": host, "insecure": True}))
    make_access(load_settings({"host": host, "api_key": "sk-1"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_listening_to_this_machine_alone_needs_no_key(host: str) -> None:
    make_access(load_settings({"host": host}))


def test_keys_come_from_a_file_with_names_and_remarks(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the fleet\nalice: sk-1\n\nsk-2  # bob\n")
    ring = read_keys("sk-0", file)
    assert [ring.name_of(key) for key in ("sk-0", "sk-1", "sk-2", "sk-3", "")] == [
        "default", "alice", "line 4", None, None,
    ]  # fmt: skip
    file.write_text("alice: sk-9\n")
    ring.replace(read_keys(None, file))
    assert (ring.name_of("sk-9"), ring.name_of("sk-1")) == ("alice", None)


def test_a_file_from_another_system_holds_the_same_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfsk-1\r\n\r\n  bob:\tsk-2 \t\r\nsk-3\t# eve\r\n \r\n# sk-4")
    ring = read_keys(None, file)
    names = {key: ring.name_of(key) for key in ("sk-1", "sk-2", "sk-3", "sk-4")}
    assert names == {"sk-1": "line 1", "sk-2": "bob", "sk-3": "line 4", "sk-4": None}
    file.write_bytes("sk-1".encode("utf-16"))
    with pytest.raises(UsageError, match="--api-key-file"):
        read_keys(None, file)


def test_a_key_is_not_cut_off_at_a_sign_in_its_middle(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice: sk#1\n")
    ring = read_keys(None, file)
    assert (ring.name_of("sk#1"), ring.name_of("sk")) == ("alice", None)


@pytest.mark.parametrize("content", ["", "# only a remark\n", "alice:\n", "sk-1\nbob: # none\n", None])
def test_a_file_without_a_key_opens_no_door(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match="--api-key-file"):
        read_keys(None, file)
