"""The engine as the HTTP side sees it: small enough to fake in forty lines. Imports no MLX."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from server.link.messages import (
    Administer,
    Administered,
    Failed,
    FailureKind,
    Generate,
    ModelInfo,
    Replan,
    Replanned,
    RequestEvent,
    Stats,
)


@dataclass(frozen=True)
class EngineStatus:
    """`info` is set when, and only when, the state is "ready"; `text` says why it is not."""

    state: Literal["loading", "ready", "down"]
    text: str = ""
    fraction: float = 0.0
    info: ModelInfo | None = None
    stats: Stats | None = None
    num_restarts: int = 0
    failure: FailureKind = "died"  # of requests while the state is not "ready"


class Engine(Protocol):
    """Turns token ids into token ids."""

    @property
    def status(self) -> EngineStatus:
        """Whether requests are answered now."""

    def health(self) -> EngineStatus:
        """The same, and the engine is asked: one that is silent for long is not ready."""

    def reserve(self) -> None:
        """Keep a place for a request that is about to be generated. Raises BusyError where none is left."""

    def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        """Events of one request, the last of them Finished or Failed.

        Closing the generator early cancels the request at the engine.
        """

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    async def administer(self, command: Administer) -> Administered | Failed:
        """Change what the prefix cache keeps, or list what is pinned there."""

    def start_now(self) -> None:
        """Start an engine that died and is to be started later; one that runs is left alone."""

    async def replan(self, command: Replan) -> Replanned | Failed:
        """Go on with another budget or policy; what is taken outlives a restart of the engine."""
