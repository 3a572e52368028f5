"""POST /chat/completions: renders, generates, and writes the answer whole or in chunks."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response

from server.api.access.receipts import Caller, Receipt
from server.api.answer import shapes
from server.api.answer.answer import Answer, Delta, merge
from server.api.answer.json_answer import respond_whole
from server.api.answer.shapes import Envelope
from server.api.answer.sse import stream
from server.api.prompt.constraints import grammar_of
from server.api.prompt.remembered import Said
from server.api.prompt.replay import Renderer
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.service import Service
from server.glm.answer_parser import AnswerParser, prompt_is_thinking
from server.link.messages import Generate, Thought

KIND = "chat.completion"
CHUNK = "chat.completion.chunk"


def chat_router(service: Service, always_sends_usage: bool) -> APIRouter:
    """The route. OpenRouter's surface always ends a stream with usage; OpenAI's only when asked."""
    router = APIRouter()
    Body = Annotated[ChatRequest, Depends(body_of(ChatRequest))]

    @router.post("/chat/completions")
    async def create_chat_completion(request: Request, body: Body) -> Response:
        caller = Caller.of(request, body.session_id, body.user)
        service.parameters.note(request, body, caller, body.requires_parameters)
        chat = await anyio.to_thread.run_sync(Chat, service, body, caller)
        if body.stream:
            chunks = chat.chunks(always_sends_usage or body.wants_usage_in_stream)
            return stream(chunks, chat.envelope, CHUNK, service.keepalive_s, chat.progress, chat.headers())
        return await respond_whole(request, chat.result(), chat.envelope.id, service.patience_s, chat.headers)

    return router


class Chat:
    """One chat, in whichever dialect it was asked for; its own is that of chat completions.

    Making one renders and tokenises, which takes a while for a long prompt. `fills_context`: a limit beyond
    the context is no error, the answer ends where the context does.
    """

    def __init__(
        self, service: Service, body: ChatRequest, caller: Caller, fills_context: bool = False
    ) -> None:
        service.model_info()
        self._service = service
        self._body = body
        self._tokenizer = service.dialect.tokenizer
        self._caller = caller
        renderer = Renderer(self._tokenizer, service.dialect.template, service.remembered, caller.owner)
        self._rendered = rendered = renderer.render(body)
        prompt = rendered.token_ids
        commands = service.commands(
            body,
            prompt,
            service.within_context(prompt, body.limit) if fills_context else body.limit,
            count=body.n or 1,
            caller=caller,
            num_top_logprobs=body.top_logprobs or 0,
            thought=self._thought(prompt),
            grammar=grammar_of(service, body),
        )
        self.answers = [self._answer(service, one) for one in commands]
        self._heard: list[list[Delta]] = [[] for _ in self.answers]
        self._explain(commands[0])
        self.envelope = Envelope(commands[0].request_id, service.model_id)
        self._receipt = Receipt(
            self.envelope.id, service.model_id, caller, bool(body.stream), len(self.answers)
        )
        service.ledger.open(self._receipt, self.answers, body.limit)
        service.engine.reserve()

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
                    self._heard[index].append(delta)
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
                said = said_of(heard, answer.token_ids, is_thinking=answer.request.thought is not None)
                self._service.remembered.add(self._caller.owner, self._rendered.answered, said)
        first = self.answers[0]
        self._service.explainer.end(first.request.request_id, first.usage.num_cached_tokens, first.token_ids)

    def _usage(self) -> dict[str, Any]:
        return shapes.usage(self.answers, self._receipt.usage(self.answers))


def said_of(heard: list[Delta], token_ids: list[int], *, is_thinking: bool) -> Said:
    """A turn as its client has it."""
    message = shapes.chat_message(heard)
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    reasoning = "".join(delta.reasoning for delta in heard)
    content = (message["content"] or "").strip()
    return Said(tuple(token_ids), reasoning, content, tuple(calls), is_thinking)
