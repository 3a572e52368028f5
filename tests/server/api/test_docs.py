"""docs/api.md and the schemas agree on every parameter of every body."""

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.openapi import BODIES as TAKES
from server.api.openapi import DescribedApp
from server.api.service import Service

DOCS = Path(__file__).parents[3] / "docs" / "api.md"
SHARED = "Shared by chat/completions, completions and responses"
SECTIONS = {
    "/chat/completions": (SHARED, "chat/completions"),
    "/completions": (SHARED, "completions"),
    "/responses": (SHARED, "responses"),
    "/messages": ("messages",),
}
VALUES: dict[str, Any] = {"best_of": 2, "background": True}
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/completions": {"prompt": "x"},
    "/responses": {"input": "x"},
    "/messages": {"model": "z-ai/glm-5.2", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]},
}


def table(heading: str) -> dict[str, str]:
    """What is said of each parameter under a heading."""
    text = DOCS.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \| (honoured|ignored|refused) \|", text, re.MULTILINE)
    return {name: verdict for names, verdict in rows for name in re.findall(r"`([a-z_]+)`", names)}


def documented(path: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for heading in SECTIONS[path]:
        merged |= table(heading)
    return merged


@pytest.fixture(scope="module")
def schemas(service: Service) -> dict[str, Any]:
    app = make_app(service)
    assert isinstance(app, DescribedApp)
    found: dict[str, Any] = app.openapi()["components"]["schemas"]
    return found


@pytest.mark.parametrize("path", SECTIONS)
def test_the_tables_name_what_the_schema_has(path: str, schemas: dict[str, Any]) -> None:
    properties = schemas[TAKES[path].body.__name__]["properties"]
    said = documented(path)
    assert (
        {name for name, verdict in said.items() if verdict != "refused"} <= properties.keys() <= said.keys()
    )
    for name, schema in properties.items():
        assert (said[name] == "ignored") == (schema.get("description") == "ignored by design"), name


@pytest.mark.parametrize("path", SECTIONS)
def test_what_the_tables_call_refused_is_refused_by_name(path: str, client: TestClient) -> None:
    refused = [name for name, verdict in documented(path).items() if verdict == "refused"]
    assert refused
    for name in refused:
        response = client.post(f"/v1{path}", json=BODIES[path] | {name: VALUES.get(name, "x")})
        assert response.status_code == 400
        assert f"'{name}'" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", SECTIONS)
def test_what_the_tables_call_ignored_changes_nothing(path: str, client: TestClient) -> None:
    ignored = {name: {"a": "b"} for name, verdict in documented(path).items() if verdict == "ignored"}
    response = client.post(f"/v1{path}", json=BODIES[path] | ignored)
    assert response.status_code == 200, response.text


def test_every_route_is_in_the_table(service: Service) -> None:
    text = DOCS.read_text(encoding="utf-8").split("## Names of the model")[0]
    paths = {
        path.removeprefix("/api/v1").removeprefix("/v1") for path in make_app(service).openapi()["paths"]
    }
    assert paths > TAKES.keys()
    for path in paths:
        assert path.replace("{model_id}", "{id}").replace("{response_id}", "{id}") in text, path
