"""The ways through the product in figures: `python -m benchmarks.walks [--files]`.

Each way is run once under `sys.setprofile`, on all threads: a chat's body until it is handed to the engine, a
decode step that reads experts from the disk, and a prompt's blocks out to the SSD and back. Counted are the
product files whose functions are called, in the order of first entrance, the pairs in which a file calls back
into one that was entered before it, and the product's own classes whose methods are called.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import mlx.core as mx

from benchmarks.api_overhead import WrittenEngine
from models.attention.attention import Span
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Service
from server.commands.checkpoint import POCKET
from server.commands.serve import load_dialect
from server.engine.prefix.lookup import DiskTier, PrefixCache
from server.link.messages import Generate
from tests.checkpoints import open_model

ROOT = Path(__file__).parents[1]
PRODUCT = tuple(str(ROOT / top) + "/" for top in ("config", "streaming", "models", "server"))
PROMPT = tuple(range(40, 340))
BODY = {
    "messages": [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "List the files."},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "ls", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "README.md"},
    ],
    "tools": [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}],
    "temperature": 0.7,
}


@dataclass
class Walk:
    """The product files that a way has entered, and how it went on between them."""

    rooms: tuple[str, ...]  # what is counted stands below these
    files: list[str] = field(default_factory=list)
    steps: set[tuple[str, str]] = field(default_factory=set)  # caller's file, called file
    nouns: set[str] = field(default_factory=set)
    known: set[FrameType] = field(default_factory=set)  # all that have begun
    begun: set[FrameType] = field(default_factory=set)
    is_over: bool = False
    start: str = ""  # nothing is counted before this file is entered

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """A profile function: notes the call of a product function."""
        here = self._file(frame)
        if event != "call" or here is None or frame.f_code.co_name.startswith("<"):
            return
        if frame in self.known:  # a coroutine or generator that goes on after a pause
            return
        self.known.add(frame)
        if self.is_over:
            return
        if not self.files and not here.startswith(self.start):
            return
        self.begun.add(frame)
        if here not in self.files:
            self.files.append(here)
        owner = frame.f_locals.get("self")
        if owner is not None and self._is_ours(sys.modules[type(owner).__module__].__file__ or ""):
            self.nouns.add(type(owner).__name__)
        caller = frame.f_back
        while caller is not None and caller not in self.begun:
            caller = caller.f_back
        if caller is not None and (before := self._file(caller)) and before != here:
            self.steps.add((before, here))

    @property
    def returns(self) -> list[tuple[str, str]]:
        """Calls from a file back into one that was entered before it."""
        place = {name: index for index, name in enumerate(self.files)}
        return sorted((a, b) for a, b in self.steps if place[b] < place[a])

    def _is_ours(self, name: str) -> bool:
        return name.startswith(tuple(f"{ROOT}/{room}" for room in self.rooms))

    def _file(self, frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        return name.removeprefix(f"{ROOT}/") if self._is_ours(name) else None


@contextmanager
def watched(walk: Walk) -> Iterator[Walk]:
    """Runs the body under the walk's profile, with the threads that it starts."""
    threading.setprofile(walk.note)
    sys.setprofile(walk.note)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walk_of_a_prompt() -> Walk:
    """From the body of a chat to the engine's `generate`."""
    walk = Walk(("config", "server"), start="server/api/request/body.py")

    class Engine(WrittenEngine):
        def generate(self, request: Generate):  # type: ignore[no-untyped-def]
            walk.is_over = True
            return super().generate(request)

    app = make_app(Service(Engine([5]), load_dialect(POCKET), ModelNames("z-ai/glm-5.2", "any")))
    raw = json.dumps(BODY).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": [],
        "http_version": "1.1", "scheme": "http", "server": ("here", 80), "client": ("here", 1),
    }  # fmt: skip

    parts: list[bytes] = []

    async def receive() -> dict[str, object]:
        if not parts:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": parts.pop()}

    async def send(message: object) -> None:
        pass

    def ask(is_counted: bool) -> None:
        parts.append(raw)
        walk.is_over = not is_counted
        asyncio.run(app(dict(scope), receive, send))

    with watched(walk):  # from the first, in which what is made once is made, threads that are kept among it
        ask(is_counted=False)
        ask(is_counted=True)
    return walk


def walk_of_an_expert() -> Walk:
    """From the file to the product, in a step whose experts are not in memory."""
    walk = Walk(("streaming", "models/experts", "models/arithmetic"))
    with threads_watched(walk):
        opened = open_model(POCKET, 16)
        cache = opened.model.make_cache()
        mx.eval(opened.model(mx.array(PROMPT[:40]), [Span(cache, 0, 40)]))
    walk.files, walk.steps, walk.nouns = [], set(), set()
    walk.is_over = False
    with watched(walk):
        mx.eval(opened.model(mx.array([7]), [Span(cache, 0, 1)]))
    walk.is_over = True
    opened.store.close()
    return walk


@contextmanager
def threads_watched(walk: Walk) -> Iterator[None]:
    """Threads that are started in the body note their calls, from when the walk begins."""
    walk.is_over = True
    threading.setprofile(walk.note)
    yield
    threading.setprofile(None)


def walk_of_a_block() -> Walk:
    """From a sequence's cache to the SSD, and back into another cache."""
    walk = Walk(("streaming", "models/attention/cache_blocks", "server/engine/prefix"))
    opened = open_model(POCKET, None)
    cache, other = opened.model.make_cache(), opened.model.make_cache()
    mx.eval(opened.model(mx.array(PROMPT), [Span(cache, 0, len(PROMPT))]))
    with tempfile.TemporaryDirectory() as folder, threads_watched(walk):
        disk = DiskTier(Path(folder), 10**9, 10**9)
        saving = PrefixCache(bytes(32), 10**8, disk)
        walk.is_over = False
        with watched(walk):
            saving.save(PROMPT, cache)
            assert saving.flush(30)
        walk.is_over = True
        saving.close(30)
        reading = PrefixCache(bytes(32), 10**8, disk)
        walk.is_over = False
        with watched(walk):
            restoring = reading.restore(PROMPT, other)
            while not (restoring.wait(5) and restoring.advance()):
                pass
        walk.is_over = True
        assert other.length > 200, "the blocks came back"
        reading.close(30)
    return walk


WALKS: dict[str, Callable[[], Walk]] = {
    "a prompt, from the body to the engine": walk_of_a_prompt,
    "an expert, from the file to the product": walk_of_an_expert,
    "a saved block, out and back": walk_of_a_block,
}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", action="store_true", help="name them")
    names_files = parser.parse_args(given).files
    for title, make in WALKS.items():
        walk = make()
        print(f"{title}: {len(walk.files)} files, {len(walk.returns)} returns, {len(walk.nouns)} classes")
        if names_files:
            print(*(f"    {name}" for name in walk.files), sep="\n")
            print(*(f"    back: {a} -> {b}" for a, b in walk.returns), sep="\n")
            print(f"    classes: {', '.join(sorted(walk.nouns))}")


if __name__ == "__main__":
    main()
