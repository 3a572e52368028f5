"""The server in one event loop, over an engine process that counts; sockets, pipe and deaths are real."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from server.api.app import make_app
from server.api.connection import HttpConnection
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.messages import EngineConfig
from server.link.supervisor import EngineProcess


@dataclass
class Served:
    """Where it listens, and what stands behind."""

    url: str
    port: int
    engine: EngineProcess


@asynccontextmanager
async def served(tokenizer: Tokenizer, kind: str, **options: Any) -> AsyncIterator[Served]:
    """A running server over `tests.server.link.fake_worker` of this kind, ready."""
    config = EngineConfig(Path(kind), False, 10**9, None, "error")
    engine = EngineProcess(config, worker="tests.server.link.fake_worker", **options)
    template = ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours")
    app = make_app(Service(engine, Dialect(tokenizer, template), ModelNames("glm")))
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # small, so that a client that does not read is felt soon
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server = uvicorn.Server(
        uvicorn.Config(app, http=HttpConnection, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    engine.start()
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while engine.status.state != "ready" or not server.started:
            await asyncio.sleep(0.01)
        port = listener.getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", port, engine)
    finally:
        server.should_exit = True
        await serving
        await engine.close()
        listener.close()


def body(first: int, max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion by token ids: the counting model answers with the ids that follow."""
    return {"prompt": [first], "max_tokens": max_tokens, "temperature": 0, **more}
