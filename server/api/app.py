"""The HTTP application. `make_app` is its only entrance; the command line and the tests call it."""

from fastapi import FastAPI

from server.api.catalogue import health_router, models_router
from server.api.chat import chat_router
from server.api.completions import completion_router
from server.api.errors import install_error_handlers
from server.api.metrics import metrics_router
from server.api.service import Service

# OpenRouter's base path, OpenAI's, and none, as mlx-lm also has it.
BASES = ("/api/v1", "/v1", "")


def make_app(service: Service) -> FastAPI:
    """An app over this service. It starts and stops nothing: the engine is the caller's."""
    app = FastAPI(title="glmserve", docs_url=None, redoc_url=None)
    for base in BASES:
        is_openrouter = base == "/api/v1"
        app.include_router(chat_router(service, is_openrouter), prefix=base)
        app.include_router(completion_router(service, is_openrouter), prefix=base)
        app.include_router(models_router(service), prefix=base)
    app.include_router(health_router(service))
    app.include_router(metrics_router(service.engine))
    install_error_handlers(app)
    return app
