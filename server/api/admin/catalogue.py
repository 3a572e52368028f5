"""GET /models: one answer for OpenAI's, Anthropic's and OpenRouter's clients; GET /health."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import JSONResponse

from config.errors import RETRY_AFTER_S, RequestError
from server.api.error_bodies import PROVIDER
from server.api.service import Service

FREE = dict.fromkeys(("prompt", "completion", "request", "image", "web_search", "internal_reasoning"), "0")
PARAMETERS = [
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "max_completion_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs",
    "tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "reasoning",
    "reasoning_effort", "include_reasoning",
]  # fmt: skip
# Asked of something that is not there they are a 404, as a GET is.
CHANGES = ["POST", "PUT", "PATCH", "DELETE"]
ARCHITECTURE = {
    "modality": "text->text",
    "input_modalities": ["text"],
    "output_modalities": ["text"],
    "tokenizer": "Other",
    "instruct_type": None,
}


def models_router(service: Service) -> APIRouter:
    """The list, which has one entry, and that entry."""
    router = APIRouter()

    @router.get("/models")
    @router.get("/models/user")
    async def list_models() -> dict[str, Any]:
        card = model_card(service)
        length = card["context_length"]
        local = {"key": card["id"], "id": card["id"], "max_context_length": length}
        local["loaded_instances"] = [{"config": {"context_length": length}}]
        return {
            "object": "list",
            "total_count": 1,
            "links": {"next": None},
            "has_more": False,
            "first_id": card["id"],
            "last_id": card["id"],
            "data": [card],
            "models": [local],  # LM Studio's form
        }

    @router.get("/models/count")
    async def count_models() -> dict[str, Any]:
        return {"data": {"count": 1}}

    @router.get("/models/{model_id:path}/endpoints")
    async def list_endpoints(model_id: str) -> dict[str, Any]:
        _check_id(service, model_id)
        return {"data": _endpoints(service)}

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        _check_id(service, model_id)
        return model_card(service)

    @router.get("/model/{model_id:path}")
    async def get_openrouter_model(model_id: str) -> dict[str, Any]:
        _check_id(service, model_id)
        return {"data": model_card(service)}

    @router.api_route("/models/{model_id:path}", methods=CHANGES, include_in_schema=False)
    @router.api_route("/model/{model_id:path}", methods=CHANGES, include_in_schema=False)
    async def change_model(model_id: str) -> None:
        _check_id(service, model_id.removesuffix("/endpoints"))
        raise HTTPException(405, "a model can only be read", {"Allow": "GET, HEAD"})

    return router


def _check_id(service: Service, model_id: str) -> None:
    if not service.names.means_us(model_id):
        message = f"there is no model {model_id[:100]!r} here; this server has {service.model_id!r}"
        raise RequestError(message, status=404, error_type="not_found")


def health_router(service: Service) -> APIRouter:
    """200 when requests are answered, 503 with the reason and the progress when not."""
    router = APIRouter()

    @router.get("/health")
    async def get_health() -> Response:
        status = service.engine.health()
        body: dict[str, Any] = {"status": status.state, "model": service.model_id}
        if status.info:
            return JSONResponse(body | {"context_length": status.info.context_length})
        body |= {"reason": status.text, "progress": round(status.fraction, 3)}
        return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})

    return router


def model_card(service: Service) -> dict[str, Any]:
    """The model as catalogues describe it; the context is 0 until the engine has opened the model."""
    info = service.engine.status.info
    length = info.context_length if info else 0
    defaults, always_thinks = service.dialect.defaults, service.dialect.template.always_thinks
    return {
        "id": service.model_id,
        "canonical_slug": service.model_id,
        "hugging_face_id": service.dialect.hugging_face_id,
        "name": f"{service.model_id} (local)",
        "created": service.started_at,
        "description": "",
        "context_length": length,
        "object": "model",
        "type": "model",  # this and the next four are Anthropic's
        "display_name": f"{service.model_id} (local)",
        "created_at": datetime.fromtimestamp(service.started_at, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": length,
        "owned_by": service.model_id.partition("/")[0],
        "max_model_len": length,
        "architecture": ARCHITECTURE,
        "pricing": FREE,
        "top_provider": {
            "context_length": length,
            # Clients ask for as many as stand here, and beside a prompt a whole context is too much.
            "max_completion_tokens": None,
            "is_moderated": False,
        },
        "per_request_limits": None,
        "supported_parameters": PARAMETERS,
        "default_parameters": {"temperature": defaults.temperature, "top_p": defaults.top_p},
        "supported_voices": None,
        "reasoning": {
            "mandatory": always_thinks,
            "supported_efforts": ["low", "high", "xhigh"] if always_thinks else ["high", "xhigh"],
            "default_effort": "xhigh",
            "supports_max_tokens": True,
        },
        "links": {"details": f"/api/v1/models/{service.model_id}/endpoints"},
    }


def _endpoints(service: Service) -> dict[str, Any]:
    """Who serves the model: we do."""
    card = model_card(service)
    length = card["context_length"]
    endpoint = {
        "name": f"{PROVIDER} | {service.model_id}",
        "model_id": service.model_id,
        "model_name": card["name"],
        "provider_name": PROVIDER,
        "tag": PROVIDER,
        "context_length": length,
        "pricing": {"prompt": "0", "completion": "0"},
        "quantization": "unknown",
        "max_completion_tokens": None,
        "max_prompt_tokens": length,
        "supported_parameters": PARAMETERS,
        "supports_tool_choice": dict.fromkeys(("auto", "function", "none", "required"), True),
        "supports_implicit_caching": True,
        "supports_diarization": False,
        "native_tools": {},
        "service_tier": None,
        "status": 0,
        "uptime_last_5m": None,
        "uptime_last_30m": None,
        "uptime_last_1d": None,
        "latency_last_30m": None,
        "throughput_last_30m": None,
    }
    named = ("id", "name", "created", "description", "architecture")
    return {name: card[name] for name in named} | {"endpoints": [endpoint]}
