"""POST /tokenize and /detokenize, with the fields of vLLM and of llama.cpp."""

from typing import Annotated, Any, Self

import anyio.to_thread
from fastapi import APIRouter, Depends
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from server.api.prompt.replay import prompt_of
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import Listed, fault
from server.api.request.completion_schema import TokenId, whole_ids
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

    tokens: Annotated[Listed[TokenId], Field(max_length=2**21), BeforeValidator(whole_ids)]


def tokenize_router(service: Service) -> APIRouter:
    """Both directions."""
    router = APIRouter()
    tokenizer = service.dialect.tokenizer
    Text = Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))]
    Ids = Annotated[DetokenizeRequest, Depends(body_of(DetokenizeRequest))]

    def encode(body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            return prompt_of(tokenizer, service.dialect.template, body.chat())
        return tokenizer.encode(body.prompt or body.content or "")

    @router.post("/tokenize")
    async def tokenize(body: Text) -> dict[str, Any]:
        tokens = await anyio.to_thread.run_sync(encode, body)
        info = service.engine.status.info
        return {"tokens": tokens, "count": len(tokens), "max_model_len": info.context_length if info else 0}

    @router.post("/detokenize")
    async def detokenize(body: Ids) -> dict[str, Any]:
        text = await anyio.to_thread.run_sync(tokenizer.decode, body.tokens)
        return {"prompt": text, "content": text}

    return router
