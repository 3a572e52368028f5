"""What every route needs, made once per app: the engine, the dialect, and the model's name card."""

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from config.errors import ContextOverflow, RequestError
from config.plan import MIN_REQUEST_BYTES
from server.api.access.conversations import Conversations
from server.api.access.receipts import Caller, Ledger
from server.api.answer.answer import WaitingRequests
from server.api.answer.recent_items import RecentItems
from server.api.error_bodies import GenerationFailed
from server.api.prompt.explain import Explainer
from server.api.prompt.grammar_desk import GrammarDesk
from server.api.prompt.remembered import Remembered
from server.api.request.common_fields import GenerationRequest
from server.api.request.model_names import ModelNames
from server.api.request.parameters import Parameters
from server.api.request.turns import Presence
from server.api.request.workload import Workload
from server.glm.files import SamplingDefaults
from server.glm.pieces import Check
from server.glm.schemas.trial import Vocabulary, Written
from server.glm.templates.template import ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.engine_protocol import Engine
from server.link.messages import Generate, ModelInfo, Sampling, Thought


@dataclass(frozen=True)
class Dialect:
    """How a checkpoint writes: its tokens, its conversations, its recommended sampling.

    `folder`: where the checkpoint is; without it grammars are written and not tried.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    folder: Path | None = None
    hugging_face_id: str = "zai-org/GLM-5.2"


@dataclass(frozen=True)
class Service:
    """Shared by all requests; what changes in it are the ledger and the line of those who wait."""

    engine: Engine
    dialect: Dialect
    names: ModelNames
    ledger: Ledger = field(default_factory=Ledger)
    line: WaitingRequests = field(default_factory=WaitingRequests)
    remembered: Remembered = field(default_factory=Remembered)
    explainer: Explainer = field(default_factory=Explainer)
    conversations: Conversations = field(default_factory=Conversations)
    keepalive_s: float = 5.0
    patience_s: float | None = 10.0
    recent_items: RecentItems = field(default_factory=RecentItems)
    parameters: Parameters = field(default_factory=Parameters)
    workload: Workload = field(default_factory=Workload)
    grammars: GrammarDesk = field(default_factory=GrammarDesk)
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Let the workload follow the plan of whichever engine runs."""
        self.workload.limit = self._request_bytes

    def _request_bytes(self) -> int:
        info = self.engine.status.info
        return max(info.request_bytes if info else 0, MIN_REQUEST_BYTES)

    @property
    def vocabulary(self) -> Vocabulary:
        """What a grammar is tried with."""
        tokenizer = self.dialect.tokenizer
        return Vocabulary(self.dialect.folder, self.model_info().vocab_size, tokenizer.eos_token_ids)

    @property
    def model_id(self) -> str:
        """The name that answers carry."""
        return self.names.served

    def model_info(self) -> ModelInfo:
        """The model, if it answers now."""
        status = self.engine.status
        if status.info is None:
            percent = f" ({status.fraction:.0%})" if status.state == "loading" else ""
            raise GenerationFailed(status.failure, f"the model is not ready: {status.text}{percent}")
        return status.info

    def recognised(self, caller: Caller, pieces: Iterable[str]) -> Caller:
        """The caller with the conversation that a prompt of these pieces continues."""
        found = self.conversations.find(caller.group, caller.label, pieces)
        return replace(caller, conversation=found)

    def commands(
        self,
        body: GenerationRequest,
        prompt: list[int],
        max_tokens: int | None,
        *,
        count: int,
        caller: Caller,
        num_top_logprobs: int,
        thought: Thought | None = None,
        written: Written | None = None,
        score_prompt: bool = False,
    ) -> list[Generate]:
        """The engine's form of a request, checked against the model: one for each of `count` answers.

        Their seeds differ. A `max_tokens` of None is all that the context has room for.
        """
        info = self.model_info()
        self.names.check(body.model, body.models or [])
        _check_prompt(prompt, info)
        if max_tokens is not None and max_tokens >= info.context_length:
            max_tokens = None  # beside no prompt is there room for it: the client means all that there is
        available = info.context_length - len(prompt)
        if available < (1 if max_tokens is None else max_tokens):
            raise ContextOverflow(info.context_length, len(prompt), max_tokens or 0)
        token_ids = array("i", prompt)
        request_id = caller.record.take_id()
        return [
            Generate(
                request_id=f"{request_id}-{index}" if index else request_id,
                token_ids=token_ids,
                max_tokens=available if max_tokens is None else max_tokens,
                sampling=self._sampling(body, info, index),
                stop_token_ids=self.dialect.tokenizer.eos_token_ids,
                num_top_logprobs=num_top_logprobs,
                score_prompt=score_prompt,
                thought=thought,
                grammar=written.grammar if written else "",
                grammar_bytes=written.num_bytes if written else 0,
                agent=caller.agent,
                cache_group=caller.key.cache_group,
                priority="background" if body.service_tier == "flex" else "interactive",
            )
            for index in range(count)
        ]

    def check_length(self, wanted: Presence, limit: int | None) -> Check:
        """What ends the making of a prompt: nobody wants it, or it is longer than the context."""
        length = self.model_info().context_length
        stated = limit if limit is not None and limit < length else 0

        def check(num_ids: int) -> None:
            wanted.check()
            if num_ids > length:
                raise ContextOverflow(length, num_ids, stated)

        return check

    def within_context(self, prompt: list[int], max_tokens: int | None) -> int | None:
        """The limit, or what the context has room for where that is less."""
        available = self.model_info().context_length - len(prompt)
        return max_tokens if max_tokens is None else max(min(max_tokens, available), 1)

    def _sampling(self, body: GenerationRequest, info: ModelInfo, index: int) -> Sampling:
        defaults = self.dialect.defaults
        values = {name: getattr(defaults, name) for name in SamplingDefaults.__dataclass_fields__}
        values |= body.given("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values |= body.given("presence_penalty", "frequency_penalty")
        values["seed"] = None if body.seed is None else body.seed + index
        return Sampling(**values, logit_bias=_logit_bias(body.logit_bias or {}, info.vocab_size))


def _check_prompt(prompt: list[int], info: ModelInfo) -> None:
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if (largest := max(prompt)) >= info.vocab_size:
        message = f"token id {largest} is outside of the vocabulary (0 to {info.vocab_size - 1})"
        raise RequestError(message, param="prompt")


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            message = f"logit_bias: {key[:40]!r} is not a token id (0 to {vocab_size - 1})"
            raise RequestError(message, param="logit_bias")
    return tuple((int(key), value) for key, value in bias.items())
