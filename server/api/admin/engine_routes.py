"""POST /engine/start: an engine that died too often is started now, not at the next of its rare attempts."""

from typing import Any

from fastapi import APIRouter, Depends

from server.api.access.guard import Access, require_admin
from server.api.service import Service


def engine_router(service: Service, access: Access) -> APIRouter:
    """For admins."""
    router = APIRouter(prefix="/engine", dependencies=[Depends(require_admin(access))])

    @router.post("/start", status_code=202)
    async def start() -> dict[str, Any]:
        service.engine.start_now()
        status = service.engine.status
        return {"data": {"status": status.state, "reason": status.text}}

    return router
