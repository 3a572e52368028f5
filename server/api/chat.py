"""POST /chat/completions: renders, generates, and writes the answer whole or in chunks."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api import shapes
from server.api.answer import Answer, Delta
from server.api.body import body_of
from server.api.chat_schema import ChatRequest
from server.api.disconnect import while_connected
from server.api.service import Service
from server.api.shapes import Envelope
from server.api.sse import stream
from server.glm.effort import template_options

KIND = "chat.completion"
CHUNK = "chat.completion.chunk"


def chat_router(service: Service, always_sends_usage: bool) -> APIRouter:
    """The route. OpenRouter's surface always ends a stream with usage; OpenAI's only when asked."""
    router = APIRouter()
    Body = Annotated[ChatRequest, Depends(body_of(ChatRequest))]

    @router.post("/chat/completions")
    async def create_chat_completion(request: Request, body: Body) -> Response:
        chat = await anyio.to_thread.run_sync(_Chat, service, body)
        if body.stream:
            chunks = chat.chunks(always_sends_usage or body.wants_usage_in_stream)
            return stream(chunks, chat.envelope, CHUNK, service.keepalive_s)
        result = await while_connected(request, chat.result())
        return JSONResponse(result, headers={"X-Generation-Id": chat.envelope.id})

    return router


class _Chat:
    """One chat completion. Making one renders and tokenises, which takes a while for a long prompt."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        service.model_info()
        self._body = body
        self._tokenizer = service.dialect.tokenizer
        prompt = self._tokenizer.encode(_render(service, body))
        max_tokens = body.max_completion_tokens or body.max_tokens
        command = service.command(body, prompt, max_tokens, body.top_logprobs or 0)
        self._answer = Answer(service.engine, self._tokenizer, command, body.stops)
        self.envelope = Envelope(command.request_id, service.model_id)

    async def result(self) -> dict[str, Any]:
        """The whole answer."""
        deltas = [delta async for delta in self._visible_deltas()]
        scores = [score for delta in deltas for score in delta.scores]
        reasoning = "".join(delta.reasoning for delta in deltas)
        content = "".join(delta.content for delta in deltas)
        message = {"message": shapes.chat_message(reasoning, content)}
        logprobs = shapes.chat_logprobs(self._tokenizer, scores) if self._body.logprobs else None
        choice = shapes.chat_choice(message, logprobs, self._answer.reason)
        return self.envelope.wrap(KIND, choices=[choice], usage=shapes.usage([self._answer]))

    async def chunks(self, sends_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks: the role first, usage last."""
        yield self._chunk({"role": "assistant", "content": ""})
        async with aclosing(self._visible_deltas()) as deltas:
            async for delta in deltas:
                if delta.reasoning or delta.content or (delta.scores and self._body.logprobs):
                    yield self._chunk(shapes.chat_delta(delta), delta)
        yield self._chunk({"content": ""}, reason=self._answer.reason)
        if sends_usage:
            yield self.envelope.wrap(CHUNK, choices=[], usage=shapes.usage([self._answer]))

    def _chunk(
        self, delta: dict[str, Any], source: Delta | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if source and source.scores and self._body.logprobs:
            logprobs = shapes.chat_logprobs(self._tokenizer, source.scores)
        return self.envelope.wrap(CHUNK, choices=[shapes.chat_choice({"delta": delta}, logprobs, reason)])

    async def _visible_deltas(self) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._answer.deltas()) as deltas:
            async for delta in deltas:
                yield Delta("", delta.content, delta.scores) if self._body.hides_reasoning else delta


def _render(service: Service, body: ChatRequest) -> str:
    options = template_options(body.effort, body.is_thinking_enabled)
    options["clear_thinking"] = body.clears_thinking
    return service.dialect.template.render(body.template_messages(), body.template_tools(), options)
