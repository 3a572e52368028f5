"""An app over a scripted engine, in process and over a real socket."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from config.settings import Settings
from server.api.app import make_app
from server.api.doors import Doors
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.commands.http_server import make_server_config
from server.glm.files import SamplingDefaults
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine

Script = Callable[[str], ScriptedEngine]


@pytest.fixture(scope="session")
def dialect(tokenizer: Tokenizer) -> Dialect:
    template = ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours")
    return Dialect(tokenizer, template, SamplingDefaults(temperature=0.7, top_p=0.9))


@pytest.fixture(scope="module")
def served_engine() -> ScriptedEngine:
    """The engine behind a module's one server; tests ask for `engine`, which is this one made new."""
    return ScriptedEngine([])


@pytest.fixture
def engine(served_engine: ScriptedEngine, tokenizer: Tokenizer) -> ScriptedEngine:
    """Thinks "hm", says "Hi Ærø 👋!", ends its turn."""
    vars(served_engine).update(vars(ScriptedEngine(tokenizer.encode("hm</think>Hi Ærø 👋!<|user|>"))))
    return served_engine


@pytest.fixture(scope="module")
def service(served_engine: ScriptedEngine, dialect: Dialect) -> Service:
    return Service(served_engine, dialect, ModelNames("z-ai/glm-5.2"), keepalive_s=0.05)


@pytest.fixture(scope="module")
def module_client(service: Service) -> TestClient:
    return local_client(make_app(service))


@pytest.fixture
def client(module_client: TestClient, engine: ScriptedEngine) -> TestClient:
    return module_client


@pytest.fixture(scope="module")
def module_url(service: Service) -> Iterator[str]:
    """Where a real server listens."""
    with running_server(service) as url:
        yield url


@pytest.fixture
def base_url(module_url: str, engine: ScriptedEngine) -> str:
    """The same, with a new script."""
    return module_url


def local_client(app: FastAPI, headers: dict[str, str] | None = None) -> TestClient:
    """A client on the server's own machine, who is an admin where there are no keys."""
    return TestClient(app, "http://localhost", headers=headers, client=("127.0.0.1", 50000))


@contextmanager
def running_server(service: Service) -> Iterator[str]:
    """A server on a thread of its own, open to all."""
    with running_app(make_app(service)) as url:
        yield url


@contextmanager
def running_app(app: FastAPI, doors: Doors | None = None) -> Iterator[str]:
    """The same for an app that is made already."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(make_server_config(Settings(), app, doors or Doors(), app.state.watch.end))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
