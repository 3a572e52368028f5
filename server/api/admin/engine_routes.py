"""POST /engine/start: an engine that died too often is started now, not at the next of its rare attempts."""

from typing import Any

from fastapi import APIRouter

from server.api.service import Service


def engine_router(service: Service) -> APIRouter:
    """For everybody with a key, as the other routes of administration are."""
    router = APIRouter(prefix="/engine")

    @router.post("/start", status_code=202)
    async def start() -> dict[str, Any]:
        service.engine.start_now()
        status = service.engine.status
        return {"data": {"status": status.state, "reason": status.text}}

    return router
