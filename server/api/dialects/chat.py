"""POST /chat/completions: renders, generates, and writes the answer whole or in chunks."""

from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server.api.access.conversations import pieces_of_chat
from server.api.access.receipts import Caller, Receipt, holder_of
from server.api.answer import shapes
from server.api.answer.answer import Answer, Delta, Heard, merge
from server.api.answer.json_answer import respond_whole, while_connected
from server.api.answer.shapes import Envelope
from server.api.answer.sse import stream
from server.api.dialects.client_words import in_words_of
from server.api.prompt.constraints import order_of
from server.api.prompt.remembered import Said
from server.api.prompt.replay import Renderer
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import Noted
from server.api.request.turns import Presence
from server.api.request.workload import lease_of
from server.api.service import Service
from server.glm.answer_parser import AnswerParser, prompt_is_thinking
from server.glm.schemas.grammar_order import GrammarOrder
from server.glm.schemas.trial import Written
from server.link.messages import Generate, Thought

KIND = "chat.completion"
CHUNK = "chat.completion.chunk"
# An id as Python has it, in a list and a tuple.
TOKEN_BYTES = 48


def chat_router(service: Service, always_sends_usage: bool) -> APIRouter:
    """The route. OpenRouter's surface always ends a stream with usage; OpenAI's only when asked."""
    router = APIRouter()
    Body = Annotated[ChatRequest, Depends(body_of(ChatRequest))]

    @router.post("/chat/completions")
    async def create_chat_completion(request: Request, body: Body) -> Response:
        caller = Caller.of(request, body.session_id, body.user)
        chat = await open_chat(
            service, request, body, caller, lambda: body, requires_all=body.requires_parameters
        )
        if body.stream:
            chunks = chat.chunks(always_sends_usage or body.wants_usage_in_stream)
            return stream(chunks, chat.envelope, CHUNK, service.keepalive_s, chat.progress, chat.headers())
        return await respond_whole(request, chat.result(), chat.envelope.id, service.patience_s, chat.headers)

    return router


async def open_chat(
    service: Service,
    request: Request,
    asked: Noted,
    caller: Caller,
    make_body: Callable[[], ChatRequest],
    *,
    words: Mapping[str, str] | None = None,
    requires_all: bool = False,
    fills_context: bool = False,
) -> "Chat":
    """Makes a chat of a body, when it is its sender's turn. Ends when the client leaves.

    `words`: the client's names of what is to blame.
    """
    lease, holder = lease_of(request), holder_of(request)

    async def make() -> Chat:
        def read(wanted: Presence) -> tuple[ChatRequest, GrammarOrder | None]:
            wanted.check()
            service.parameters.note(request, asked, caller, requires_all)
            service.model_info()
            body = make_body()
            return body, order_of(service.dialect.tokenizer, body)

        body, order = await lease.run(holder, read)
        written = Written("")
        if order:
            written = await service.grammars.write(order, service.vocabulary, holder)
        chat = await lease.run(
            holder, lambda wanted: Chat(service, body, caller, written, wanted, fills_context)
        )
        lease.hold(lease.kept_bytes + chat.kept_bytes)
        return chat

    with in_words_of(words or {}):
        return await while_connected(request, make())


class Chat:
    """One chat, in whichever dialect it was asked for; its own is that of chat completions.

    Making one renders and tokenises, which takes a while for a long prompt. `fills_context`: a limit beyond
    the context is no error, the answer ends where the context does.
    """

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        caller: Caller,
        written: Written,
        wanted: Presence,
        fills_context: bool = False,
    ) -> None:
        service.model_info()
        self._service = service
        self._body = body
        self._tokenizer = service.dialect.tokenizer
        self._caller = caller = service.recognised(caller, pieces_of_chat(body.template_messages()))
        renderer = Renderer(self._tokenizer, service.dialect.template, service.remembered, caller.owner)
        self._rendered = rendered = renderer.render(
            body, service.check_length(wanted, 1 if fills_context and body.limit else body.limit)
        )
        prompt = rendered.token_ids
        commands = service.commands(
            body,
            prompt,
            service.within_context(prompt, body.limit) if fills_context else body.limit,
            count=body.n or 1,
            caller=caller,
            num_top_logprobs=body.top_logprobs or 0,
            thought=self._thought(prompt),
            written=written,
        )
        self.answers = [self._answer(service, one) for one in commands]
        self._heard = [Heard() for _ in self.answers]
        self._explain(commands[0])
        self.envelope = Envelope(commands[0].request_id, service.model_id)
        self._receipt = Receipt(
            self.envelope.id, service.model_id, caller, bool(body.stream), len(self.answers)
        )
        service.ledger.open(self._receipt, self.answers, body.limit)
        service.engine.reserve()

    @property
    def kept_bytes(self) -> int:
        """Memory of the prompt's ids, up to the end of the answer."""
        return TOKEN_BYTES * len(self._rendered.token_ids)

    def _explain(self, command: Generate) -> None:
        found = self._service.explainer.begin(
            command.request_id,
            self._caller,
            self._tokenizer,
            command.token_ids,
            self._body.template_messages(),
            self._body.template_tools() or [],
            self._rendered.num_replayed,
        )
        self.answers[0].remark = found.line

    def headers(self) -> dict[str, str]:
        """What is known of the prompt's way through the prefix cache, at this time."""
        found = self._service.explainer.find(self.answers[0].request.request_id)
        return {"X-Glmserve-Cache": found.line} if found and found.line else {}

    def _thought(self, prompt: list[int]) -> Thought | None:
        end_id = self._tokenizer.end_think_id
        if end_id is None or not prompt_is_thinking(self._tokenizer, prompt):
            return None
        return Thought(end_id, self._body.max_reasoning_tokens)

    def _answer(self, service: Service, command: Generate) -> Answer:
        parser = AnswerParser(self._tokenizer, command.token_ids, self._body.tool_set())
        max_calls = 1 if self._body.parallel_tool_calls is False else None
        return Answer(service.engine, parser, command, self._body.stops, max_calls, service.line)

    def progress(self) -> str:
        """How far the prompt has been read, for those who wait."""
        return self.answers[0].progress

    async def result(self) -> dict[str, Any]:
        """The whole answer."""
        deltas: list[list[Delta]] = [[] for _ in self.answers]
        async with aclosing(self.deltas()) as merged:
            async for index, delta in merged:
                deltas[index].append(delta)
        choices = [self._choice(index, own) for index, own in enumerate(deltas)]
        return self.envelope.wrap(KIND, choices=choices, usage=self._usage())

    def _choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        scores = [score for delta in deltas for score in delta.scores]
        logprobs = shapes.chat_logprobs(self._tokenizer, scores) if self._body.logprobs else None
        message = {"message": shapes.chat_message(deltas)}
        return shapes.chat_choice(index, message, logprobs, self.answers[index].reason)

    async def chunks(self, sends_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks: the roles first, usage last."""
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                if delta.reasoning or delta.content or delta.calls or (delta.scores and self._body.logprobs):
                    yield self._chunk(index, shapes.chat_delta(delta), delta)
        for index, answer in enumerate(self.answers):
            yield self._chunk(index, {"content": ""}, reason=answer.reason)
        if sends_usage:
            yield self.envelope.wrap(CHUNK, choices=[], usage=self._usage())

    def _chunk(
        self, index: int, delta: dict[str, Any], source: Delta | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if source and source.scores and self._body.logprobs:
            logprobs = shapes.chat_logprobs(self._tokenizer, source.scores)
        choice = shapes.chat_choice(index, {"delta": delta}, logprobs, reason)
        return self.envelope.wrap(CHUNK, choices=[choice])

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What clients get to see, with the choice that it belongs to."""
        self._service.ledger.start(self._receipt)
        try:
            async with aclosing(merge([answer.deltas() for answer in self.answers])) as merged:
                async for index, delta in merged:
                    self._heard[index].add(delta)
                    yield index, replace(delta, reasoning="") if self._body.hides_reasoning else delta
        finally:
            self._remember()
            self._service.ledger.close(self._receipt, self.answers)

    def _remember(self) -> None:
        """Keep what was said for the turns to come, and what the prefix cache gave."""
        for answer, heard in zip(self.answers, self._heard, strict=True):
            # A client's bias or grammar can force a role into an answer: it must not come back as one.
            has_roles = any(map(self._tokenizer.is_special, answer.token_ids))
            if answer.is_whole_turn and not has_roles:
                said = said_of(heard.deltas, answer.token_ids, is_thinking=answer.request.thought is not None)
                self._service.remembered.add(self._caller.owner, self._rendered.answered, said)
        first = self.answers[0]
        self._service.explainer.end(first.request.request_id, first.usage.num_cached_tokens, first.token_ids)

    def _usage(self) -> dict[str, Any]:
        return shapes.usage(self.answers, self._receipt.usage(self.answers))


def said_of(heard: list[Delta], token_ids: Iterable[int], *, is_thinking: bool) -> Said:
    """A turn as its client has it."""
    message = shapes.chat_message(heard)
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    reasoning = "".join(delta.reasoning for delta in heard)
    content = (message["content"] or "").strip()
    return Said(array("i", token_ids), reasoning, content, tuple(calls), is_thinking)
