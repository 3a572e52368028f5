"""GET /models: one answer for OpenAI's, OpenRouter's and LM Studio's clients; GET /health."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from config.errors import RequestError
from server.api.service import Service

FREE = dict.fromkeys(("prompt", "completion", "request", "image", "web_search", "internal_reasoning"), "0")
PARAMETERS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "tools",
    "reasoning",
    "include_reasoning",
]


def models_router(service: Service) -> APIRouter:
    """The list, which has one entry, and that entry."""
    router = APIRouter()

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        card = model_card(service)
        length = card["context_length"]
        loaded = [{"config": {"context_length": length}}]
        local = {
            "key": card["id"],
            "id": card["id"],
            "max_context_length": length,
            "loaded_instances": loaded,
        }
        return {
            "object": "list",
            "total_count": 1,
            "links": {"next": None},
            "data": [card],
            "models": [local],
        }

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        if model_id != service.model_id:
            message = f"there is no model {model_id[:100]!r} here; this server has {service.model_id!r}"
            raise RequestError(message, status=404, error_type="not_found")
        return model_card(service)

    return router


def health_router(service: Service) -> APIRouter:
    """200 when requests are answered, 503 with the reason and the progress when not."""
    router = APIRouter()

    @router.get("/health")
    async def get_health() -> Response:
        status = service.engine.status
        body: dict[str, Any] = {"status": status.state, "model": service.model_id}
        if status.info:
            return JSONResponse(body | {"context_length": status.info.context_length})
        body |= {"reason": status.text, "progress": round(status.fraction, 3)}
        return JSONResponse(body, 503, {"Retry-After": "5"})

    return router


def model_card(service: Service) -> dict[str, Any]:
    """The model as catalogues describe it; the context is 0 until the engine has opened the model."""
    info = service.engine.status.info
    length = info.context_length if info else 0
    defaults = service.dialect.defaults
    return {
        "id": service.model_id,
        "canonical_slug": service.model_id,
        "hugging_face_id": "zai-org/GLM-5.2",
        "name": f"{service.model_id} (local)",
        "created": service.started_at,
        "description": "",
        "context_length": length,
        "object": "model",
        "owned_by": service.model_id.partition("/")[0],
        "max_model_len": length,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Other",
            "instruct_type": None,
        },
        "pricing": FREE,
        "top_provider": {
            "context_length": length,
            "max_completion_tokens": length,
            "is_moderated": False,
        },
        "per_request_limits": None,
        "supported_parameters": PARAMETERS,
        "default_parameters": {"temperature": defaults.temperature, "top_p": defaults.top_p},
        "supported_voices": None,
        "links": {"details": f"/api/v1/models/{service.model_id}/endpoints"},
    }
