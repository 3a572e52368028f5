"""POST /responses: OpenAI's newer dialect of the same chat. Stores nothing, and says so in `store`."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from config.errors import RequestError
from server.api.access.receipts import Caller
from server.api.answer import shapes
from server.api.answer.answer import Answer
from server.api.answer.items import Change, Closed, Grew, Item, Items, Opened
from server.api.answer.json_answer import respond_whole
from server.api.answer.named_events import Event, stream_named
from server.api.answer.sse import comment
from server.api.dialects.chat import Chat, open_chat
from server.api.dialects.responses_schema import ResponsesRequest, seal
from server.api.dialects.responses_tools import custom_input, own_tools
from server.api.error_bodies import describe
from server.api.request.body import body_of
from server.api.service import Service
from server.link.messages import TokenScore

PREFIXES = {"thought": "rs", "text": "msg", "call": "fc"}
# What may be asked of a path on which there is nothing: 404, not 405.
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def responses_router(service: Service) -> APIRouter:
    """The route, and the one that would give back what was stored."""
    router = APIRouter()
    Body = Annotated[ResponsesRequest, Depends(body_of(ResponsesRequest))]

    @router.post("/responses")
    async def create_response(request: Request, body: Body) -> Response:
        caller = Caller.of(request, body.session_id, body.user)
        find = partial(service.recent_items.find, caller.owner)
        chat = await open_chat(
            service,
            request,
            body,
            caller,
            lambda: body.chat(find),
            words=body.words(),
            requires_all=body.requires_parameters,
        )
        response = _Response(service, body, chat, partial(service.recent_items.add, caller.owner))
        if not body.stream:
            return await respond_whole(
                request, response.result(), chat.envelope.id, service.patience_s, chat.headers
            )
        return stream_named(
            response.events(),
            response.failed,
            lambda: comment(chat.progress()),
            service.keepalive_s,
            {"X-Generation-Id": chat.envelope.id},
        )

    @router.get("/responses/{response_id}")
    @router.api_route("/responses/{response_id:path}", methods=METHODS, include_in_schema=False)
    async def get_response(response_id: str) -> Response:
        message = f"there is no response {response_id[:100]!r}: this server stores none"
        raise RequestError(message, status=404, error_type="not_found", param="response_id")

    return router


class _Response:
    """One response as it is written."""

    def __init__(
        self, service: Service, body: ResponsesRequest, chat: Chat, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """`keep` gets each complete item of the output."""
        self._body = body
        self._keep = keep
        self._tools = {tool.flat_name: tool for tool in own_tools(body.tools)}
        self._chat = chat
        self._answer: Answer = chat.answers[0]
        self._tokenizer = service.dialect.tokenizer
        self._id = chat.envelope.id.removeprefix("gen-")
        self._num_events = 0

    async def result(self) -> dict[str, Any]:
        """The whole response."""
        items = await Items.of(self._chat.deltas())
        for item in items.closed:
            self._keep(self._closed_item(item))
        return self._object(self._status, items)

    async def events(self) -> AsyncGenerator[Event, None]:
        """The response in OpenAI's events. The arguments of a call that breaks off are never done."""
        items = Items()
        yield self._event("response.created", response=self._object("in_progress"))
        yield self._event("response.in_progress", response=self._object("in_progress"))
        async with aclosing(items.follow(self._chat.deltas())) as changes:
            async for change in changes:
                for event in self._on_change(change):
                    yield event
        yield self._event(f"response.{self._status}", response=self._object(self._status, items))

    def failed(self, error: Exception) -> Event:
        """The last event of a response that the engine gave up."""
        said = {"code": "server_error", "message": describe(error)["message"]}
        return self._event("response.failed", response=self._object("failed") | {"error": said})

    def _on_change(self, change: Change) -> Iterator[Event]:
        match change:
            case Opened(item):
                yield self._event("response.output_item.added", item, item=self._item(item, "in_progress"))
                if item.kind != "call":
                    yield self._in_part("content_part.added", item, part=self._part(item))
                if self._is_summed_up(item):
                    yield self._in_summary("part.added", item, part=_summary(item))
            case Grew(Item(kind="text") as item, text, scores):
                logprobs = self._logprobs(scores)
                yield self._in_part("output_text.delta", item, delta=text, logprobs=logprobs)
            case Grew(Item(kind="thought") as item, text):
                yield self._in_part("reasoning_text.delta", item, delta=text)
                if self._is_summed_up(item):
                    yield self._in_summary("text.delta", item, delta=text)
            case Grew(item, text) if not self._is_custom(item):
                yield self._of_item("function_call_arguments.delta", item, delta=text)
            case Closed(item):
                yield from self._close(item)

    def _close(self, item: Item) -> Iterator[Event]:
        match item.kind:
            case "text":
                logprobs = self._logprobs(item.scores)
                yield self._in_part("output_text.done", item, text=item.text, logprobs=logprobs)
            case "thought":
                yield self._in_part("reasoning_text.done", item, text=item.text)
            case "call" if self._is_custom(item):
                text = custom_input(item.text)
                yield self._of_item("custom_tool_call_input.delta", item, delta=text)
                if item.is_whole:
                    yield self._of_item("custom_tool_call_input.done", item, input=text)
            case "call" if item.is_whole:
                fields = self._named(item) | {"arguments": item.text}
                yield self._of_item("function_call_arguments.done", item, **fields)
        if item.kind != "call":
            yield self._in_part("content_part.done", item, part=self._part(item))
        if self._is_summed_up(item):
            yield self._in_summary("text.done", item, text=item.text)
            yield self._in_summary("part.done", item, part=_summary(item))
        done = self._closed_item(item)
        self._keep(done)
        yield self._event("response.output_item.done", item, item=done)

    def _event(self, kind: str, at: Item | None = None, **fields: Any) -> Event:
        self._num_events += 1
        place = {} if at is None else {"output_index": at.position}
        return {"type": kind, "sequence_number": self._num_events - 1, **place, **fields}

    def _of_item(self, kind: str, item: Item, **fields: Any) -> Event:
        return self._event(f"response.{kind}", item, item_id=self._item_id(item), **fields)

    def _in_part(self, kind: str, item: Item, **fields: Any) -> Event:
        return self._of_item(kind, item, content_index=0, **fields)

    def _in_summary(self, kind: str, item: Item, **fields: Any) -> Event:
        return self._of_item(f"reasoning_summary_{kind}", item, summary_index=0, **fields)

    def _is_summed_up(self, item: Item) -> bool:
        return item.kind == "thought" and self._body.wants_summary

    def _is_custom(self, item: Item) -> bool:
        tool = self._tools.get(item.name)
        return tool is not None and tool.is_custom

    def _named(self, item: Item) -> dict[str, Any]:
        """The name of a call's tool as the client knows it."""
        tool = self._tools.get(item.name)
        if tool is None or tool.namespace is None:
            return {"name": item.name}
        return {"name": tool.tool.name, "namespace": tool.namespace}

    @property
    def _status(self) -> str:
        return "incomplete" if self._answer.reason == "length" else "completed"

    def _object(self, status: str, items: Items | None = None) -> dict[str, Any]:
        output = [self._closed_item(item) for item in items.closed] if items else []
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._chat.envelope.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": self._chat.envelope.model,
            "output": output,
            **self._echoes(),
            "usage": self._usage() if status in ("completed", "incomplete") else None,
        }

    def _echoes(self) -> dict[str, Any]:
        """What was asked for, and what stood in for it where nothing was. Null may be, absent may not."""
        body, sampling = self._body, self._answer.request.sampling
        format_ = self._dumped(body.text.format) if body.text else None
        return {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": body.reasoning.summary if body.reasoning else None,
            },
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": format_ or {"type": "text"}},
            "tool_choice": self._dumped(body.tool_choice) or "auto",
            "tools": [tool.echo() for tool in body.tools or [] if not tool.is_hosted],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "background": False,
            "service_tier": "flex" if body.service_tier == "flex" else "default",
            "max_tool_calls": self._extra("max_tool_calls", int),
            "safety_identifier": self._extra("safety_identifier", str),
            "prompt_cache_key": self._extra("prompt_cache_key", str),
        }

    def _extra(self, name: str, kind: type) -> Any:
        """A field that means nothing here, as it came; null where it is none of its kind."""
        value = (self._body.model_extra or {}).get(name)
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    @staticmethod
    def _dumped(value: Any) -> Any:
        return value if isinstance(value, str | None) else value.model_dump(by_alias=True, exclude_none=True)

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._answer.parser.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }

    def _item_id(self, item: Item) -> str:
        return f"{PREFIXES[item.kind]}_{self._id}-{item.position}"

    def _closed_item(self, item: Item) -> dict[str, Any]:
        return self._item(item, "completed" if item.is_whole else "incomplete")

    def _item(self, item: Item, status: str) -> dict[str, Any]:
        """An output item; while it is in progress it has no content yet."""
        is_done = status != "in_progress"
        head = {"id": self._item_id(item), "status": status}
        parts = [self._part(item)] if is_done else []
        match item.kind:
            case "thought":
                summary = [_summary(item)] if is_done and self._is_summed_up(item) else []
                thought = {"type": "reasoning", "summary": summary, "content": parts}
                if is_done and self._body.wants_encrypted_thought:
                    thought["encrypted_content"] = seal(item.text)
                return head | thought
            case "text":
                return head | {"type": "message", "role": "assistant", "content": parts}
            case "call" if self._is_custom(item):
                text = custom_input(item.text) if is_done else ""
                call = {"type": "custom_tool_call", "call_id": item.call_id}
                return head | call | self._named(item) | {"input": text}
            case "call":
                arguments = item.text if is_done else ""
                call = {"type": "function_call", "call_id": item.call_id}
                return head | call | self._named(item) | {"arguments": arguments}

    def _part(self, item: Item) -> dict[str, Any]:
        if item.kind == "thought":
            return {"type": "reasoning_text", "text": item.text}
        logprobs = self._logprobs(item.scores)
        return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, scores: list[TokenScore] | tuple[TokenScore, ...]) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        found: list[dict[str, Any]] = shapes.chat_logprobs(self._tokenizer, scores)["content"]
        return found


def _summary(item: Item) -> dict[str, Any]:
    return {"type": "summary_text", "text": item.text}
