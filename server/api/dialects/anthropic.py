"""POST /messages and /messages/count_tokens: Anthropic's dialect of the same chat.

A call is sent when it is closed: Anthropic's clients read the beginning of its input as a whole one. What
there is of a call that broke off is sent as Anthropic does, with stop reason max_tokens.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any

import pydantic_core
from fastapi import APIRouter, Depends, Request, Response

from server.api.access.receipts import Caller, holder_of
from server.api.answer.answer import Answer
from server.api.answer.items import Change, Closed, Grew, Item, Items, Opened
from server.api.answer.json_answer import respond_whole, while_connected
from server.api.answer.named_events import Event, stream_named
from server.api.answer.sse import comment, encode
from server.api.dialects.anthropic_schema import CountRequest, MessagesRequest
from server.api.dialects.chat import Chat, open_chat
from server.api.dialects.client_words import in_words_of
from server.api.error_bodies import anthropic_error, describe
from server.api.prompt.replay import prompt_of
from server.api.request.body import body_of
from server.api.request.turns import Presence
from server.api.request.workload import lease_of
from server.api.service import Service

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Anthropic signs thoughts. Nobody checks ours, but clients leave out a thought whose signature is empty.
SIGNATURE = "glmserve"
# Calls come from the model; Anthropic's may also come from code that its service runs.
CALLER = {"type": "direct"}


def messages_router(service: Service) -> APIRouter:
    """Both routes."""
    router = APIRouter()
    Body = Annotated[MessagesRequest, Depends(body_of(MessagesRequest))]
    Prompt = Annotated[CountRequest, Depends(body_of(CountRequest))]

    @router.post("/messages")
    async def create_message(request: Request, body: Body) -> Response:
        caller = Caller.of(request, None, body.user)
        chat = await open_chat(
            service, request, body, caller, body.chat, words=body.words(), fills_context=True
        )
        message = _Message(chat, body.max_tokens)
        headers = {"X-Generation-Id": chat.envelope.id, "request-id": chat.envelope.id}
        if body.stream:
            return stream_named(
                message.events(),
                lambda error: anthropic_error(describe(error)),
                lambda: comment(chat.progress()) + encode({"type": "ping"}, "ping"),
                service.keepalive_s,
                headers,
            )
        response = await respond_whole(
            request, message.result(), chat.envelope.id, service.patience_s, chat.headers
        )
        response.headers["request-id"] = chat.envelope.id
        return response

    @router.post("/messages/count_tokens")
    async def count_tokens(request: Request, body: Prompt) -> dict[str, int]:
        service.parameters.note(request, body, Caller.of(request, None, None))
        service.names.check(body.model, [])
        dialect = service.dialect

        def count(presence: Presence) -> int:
            def check(_: int) -> None:
                presence.check()

            return len(prompt_of(dialect.tokenizer, dialect.template, body.chat(), check))

        with in_words_of(body.words()):
            num_tokens = await while_connected(request, lease_of(request).run(holder_of(request), count))
        return {"input_tokens": num_tokens}

    return router


class _Message:
    """One message as it is written."""

    def __init__(self, chat: Chat, max_tokens: int) -> None:
        self.chat = chat
        self._max_tokens = max_tokens
        self._answer: Answer = chat.answers[0]
        self._num_sent = 0

    async def result(self) -> dict[str, Any]:
        """The whole message."""
        items = await Items.of(self.chat.deltas())
        content = [_block(item) for item in items.closed]
        return self._head() | {"content": content, "usage": self._usage()} | self._end()

    async def events(self) -> AsyncGenerator[Event, None]:
        """The message in Anthropic's events."""
        yield {"type": "message_start", "message": self._head()}
        async with aclosing(Items().follow(self.chat.deltas())) as changes:
            async for change in changes:
                for event in self._on_change(change):
                    yield event
        yield {"type": "message_delta", "delta": self._end(), "usage": self._tokens()}
        yield {"type": "message_stop"}

    def _on_change(self, change: Change) -> Iterator[Event]:
        match change:
            case Opened(item) if item.kind != "call":
                yield self._at("start", content_block=_empty_block(item))
            case Grew(Item(kind="text"), text):
                yield self._delta("text_delta", text=text)
            case Grew(Item(kind="thought"), text):
                yield self._delta("thinking_delta", thinking=text)
            case Closed(item):
                yield from self._close(item)

    def _close(self, item: Item) -> Iterator[Event]:
        if item.kind == "call":
            yield self._at("start", content_block=_empty_block(item))
            yield self._delta("input_json_delta", partial_json=item.text)
        if item.kind == "thought":
            yield self._delta("signature_delta", signature=SIGNATURE)
        yield self._at("stop")
        self._num_sent += 1

    def _at(self, what: str, **fields: Any) -> Event:
        return {"type": f"content_block_{what}", "index": self._num_sent, **fields}

    def _delta(self, kind: str, **fields: str) -> Event:
        return self._at("delta", delta={"type": kind, **fields})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.chat.envelope.id.replace("gen-", "msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.chat.envelope.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "diagnostics": None,
            "usage": self._usage(),
        }

    def _end(self) -> dict[str, Any]:
        stop, reason = self._answer.stop_string, STOP_REASONS[self._answer.reason or "stop"]
        if stop is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and self._answer.request.max_tokens < self._max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None, "container": None}

    def _usage(self) -> dict[str, Any]:
        """Tokens so far, and how the request was served."""
        return self._tokens() | {
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "inference_geo": None,
            "service_tier": "standard",
            "speed": None,
        }

    def _tokens(self) -> dict[str, Any]:
        """Tokens so far; Anthropic counts those from the cache apart."""
        usage = self._answer.usage
        return {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._answer.parser.num_reasoning_tokens},
            "server_tool_use": None,
        }


def _empty_block(item: Item) -> dict[str, Any]:
    match item.kind:
        case "thought":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "text":
            return {"type": "text", "text": ""}
        case "call":
            return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": {}, "caller": CALLER}


def _block(item: Item) -> dict[str, Any]:
    match item.kind:
        case "thought":
            return {"type": "thinking", "thinking": item.text, "signature": SIGNATURE}
        case "text":
            return {"type": "text", "text": item.text}
        case "call":
            arguments = pydantic_core.from_json(item.text, allow_partial=not item.is_whole)
            return _empty_block(item) | {"input": arguments}
