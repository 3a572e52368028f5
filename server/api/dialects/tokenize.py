"""POST /tokenize and /detokenize, with the fields of vLLM and of llama.cpp."""

from collections.abc import Callable
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, PlainValidator, TypeAdapter, model_validator
from pydantic_core import to_json

from server.api.access.receipts import holder_of
from server.api.answer.json_answer import while_connected
from server.api.prompt.replay import prompt_of
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import fault
from server.api.request.completion_schema import token_ids
from server.api.request.turns import Presence
from server.api.request.workload import lease_of
from server.api.service import Service

MESSAGES = TypeAdapter(ChatRequest)


class TokenizeRequest(BaseModel):
    """A text, or a chat request, of which the rendered prompt is meant."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    content: str | None = None
    messages: list[Any] | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        if (self.prompt, self.content, self.messages).count(None) != 2:
            raise fault("prompt", "give one of 'prompt', 'content' and 'messages'")
        return self

    def chat(self) -> ChatRequest:
        """The chat request, checked as one."""
        fields = {"messages": self.messages} | (self.model_extra or {})
        return MESSAGES.validate_python(fields)


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(strict=True)

    tokens: Annotated[list[int], PlainValidator(token_ids)]


def tokenize_router(service: Service) -> APIRouter:
    """Both directions."""
    router = APIRouter()
    tokenizer = service.dialect.tokenizer
    Text = Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))]
    Ids = Annotated[DetokenizeRequest, Depends(body_of(DetokenizeRequest))]

    def encode(body: TokenizeRequest, wanted: Presence) -> list[int]:
        def check(_: int) -> None:
            wanted.check()

        if body.messages is not None:
            return prompt_of(tokenizer, service.dialect.template, body.chat(), check)
        return tokenizer.encode(body.prompt or body.content or "", check)

    @router.post("/tokenize")
    async def tokenize(request: Request, body: Text) -> Response:
        info = service.engine.status.info
        length = info.context_length if info else 0

        def work(wanted: Presence) -> bytes:
            tokens = encode(body, wanted)
            return to_json({"tokens": tokens, "count": len(tokens), "max_model_len": length})

        return await _respond(request, work)

    @router.post("/detokenize")
    async def detokenize(request: Request, body: Ids) -> Response:
        def work(wanted: Presence) -> bytes:
            text = tokenizer.decode(body.tokens, lambda _: wanted.check())
            return to_json({"prompt": text, "content": text})

        return await _respond(request, work)

    return router


async def _respond(request: Request, work: Callable[[Presence], bytes]) -> Response:
    """JSON that is made in its sender's turn, as long as the client is there."""
    raw = await while_connected(request, lease_of(request).run(holder_of(request), work))
    return Response(raw, media_type="application/json")
