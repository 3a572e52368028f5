"""An engine that says what the test wrote down, for tests of the HTTP side."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from server.link.engine_protocol import EngineStatus
from server.link.messages import (
    Administer,
    Administered,
    Failed,
    FailureKind,
    Finished,
    Generate,
    ModelInfo,
    Pin,
    Progress,
    PromptScored,
    Replan,
    Replanned,
    RequestEvent,
    Token,
    TokenScore,
    Usage,
)


@dataclass
class ScriptedEngine:
    """Answers each request with the next of `turns`, and when they are used up with `script`.

    After `fails_after` tokens it gives up.
    """

    script: list[int]
    turns: list[list[int]] = field(default_factory=list)
    context_length: int = 4096
    vocab_size: int = 320
    token_s: float = 0.0
    fails_after: int | None = None
    failure: FailureKind = "disk"
    ready: bool = True
    requests: list[Generate] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    administered: list[Administer] = field(default_factory=list)
    replanned: list[Replan] = field(default_factory=list)
    num_changed: int = 1  # blocks, by whatever an administrator does
    pins: tuple[Pin, ...] = ()
    refusal: Failed | None = None

    @property
    def status(self) -> EngineStatus:
        if self.ready:
            return EngineStatus("ready", info=ModelInfo(self.vocab_size, self.context_length))
        return EngineStatus("loading", "opening the model", 0.25)

    def health(self) -> EngineStatus:
        return self.status

    def reserve(self) -> None:
        """There is always a place."""

    async def administer(self, command: Administer) -> Administered | Failed:
        self.administered.append(command)
        return Administered(command.request_id, self.num_changed, self.pins)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def start_now(self) -> None:
        self.ready = True

    async def replan(self, command: Replan) -> Replanned | Failed:
        """Takes everything, or what is written down."""
        self.replanned.append(command)
        budget, policy = command.ram_budget_bytes or 10**9, command.expert_policy or "nearness"
        answer = Replanned(command.request_id, budget, policy, {"lines": {"experts": budget}}, ())
        return self.refusal or answer

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        self.requests.append(request)
        script = self.turns.pop(0) if self.turns else self.script
        name, num_prompt, is_over = request.request_id, len(request.token_ids), False
        try:
            yield Progress(name, num_prompt, num_prompt)
            if request.score_prompt:
                yield PromptScored(name, self._prompt_scores(request))
            for position, token_id in enumerate(script[: request.max_tokens]):
                await asyncio.sleep(self.token_s)
                if position == self.fails_after:
                    is_over = True
                    yield Failed(name, self.failure, "the disk is gone")
                    return
                if token_id in request.stop_token_ids:
                    is_over = True
                    yield Finished(name, "stop", Usage(num_prompt, position + 1), token_id)
                    return
                yield Token(name, score_of(token_id, request.num_top_logprobs))
            is_over = True
            yield Finished(name, "length", Usage(num_prompt, min(len(script), request.max_tokens)))
        finally:
            if not is_over:
                self.cancel(name)

    def _prompt_scores(self, request: Generate) -> tuple[TokenScore, ...]:
        first, *rest = request.token_ids
        return (TokenScore(first, None), *(score_of(token_id, request.num_top_logprobs) for token_id in rest))


def score_of(token_id: int, num_top: int) -> TokenScore:
    """A score in which the token itself is the likeliest."""
    return TokenScore(token_id, -0.5, tuple((token_id + step, -0.5 - step) for step in range(num_top)))
