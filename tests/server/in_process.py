"""The real loop on a thread, over a tiny GLM with random weights: only a grammar makes it write sense."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from server.engine.decode.token_masks import Grammars
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.schedule.shared_prefixes import Prefixes
from server.link.engine_protocol import EngineStatus
from server.link.messages import (
    Administer,
    Administered,
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Replan,
    Replanned,
    RequestEvent,
    Shutdown,
)
from tests.tiny_glm import SHARED, make_weights
from tests.tiny_model import make_model

VOCAB = 320
CONTEXT = 4096
SMALL = SHARED | {
    "vocab_size": VOCAB,
    "num_hidden_layers": 4,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"],
}


class LoopEngine:
    """An `Engine` without a process of its own."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self.inbox: SimpleQueue[Command] = SimpleQueue()
        self._requests: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestEvent]]] = {}

    @property
    def status(self) -> EngineStatus:
        return EngineStatus("ready", info=self._info)

    def health(self) -> EngineStatus:
        return self.status

    def reserve(self) -> None:
        """There is always a place."""

    async def administer(self, command: Administer) -> Administered | Failed:
        queue: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._requests[command.request_id] = (asyncio.get_running_loop(), queue)
        self.inbox.put(command)
        event = await queue.get()
        assert isinstance(event, Administered | Failed)
        return event

    def start_now(self) -> None:
        """It runs."""

    async def replan(self, command: Replan) -> Replanned | Failed:
        return Failed(command.request_id, "request", "there is no plan here")

    def cancel(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self.inbox.put(Cancel(request_id))

    def send(self, event: Event) -> None:
        assert isinstance(event, RequestEvent)
        if found := self._requests.get(event.request_id):
            loop, queue = found
            loop.call_soon_threadsafe(queue.put_nowait, event)

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        queue: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._requests[request.request_id] = (asyncio.get_running_loop(), queue)
        self.inbox.put(request)
        is_over = False
        try:
            while not is_over:
                event = await queue.get()
                is_over = isinstance(event, Finished | Failed)
                yield event
        finally:
            if is_over:
                self._requests.pop(request.request_id, None)
            else:
                self.cancel(request.request_id)


@contextmanager
def running_engine(
    backend: Backend, tokenizer_folder: Path, prefixes: Prefixes | None = None
) -> Iterator[LoopEngine]:
    """A running loop over this backend."""
    engine = LoopEngine(backend.info)
    grammars = Grammars(tokenizer_folder, VOCAB)
    loop = EngineLoop(backend, engine.inbox, engine.send, grammars=grammars, prefixes=prefixes)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield engine
    finally:
        engine.inbox.put(Shutdown())
        thread.join()


@contextmanager
def random_engine(tokenizer_folder: Path, seed: int = 3) -> Iterator[LoopEngine]:
    """A running loop over weights from this seed."""
    backend = Backend(make_model(SMALL, make_weights(SMALL, seed)), ModelInfo(VOCAB, CONTEXT))
    with running_engine(backend, tokenizer_folder) as engine:
        yield engine
