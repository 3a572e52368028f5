"""POST /memory/plan: another memory budget, or another policy of the experts, without a restart.

The engine decides, and answers with the plan that is in force then; nothing is kept here.
"""

import secrets
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import model_validator

from config.defaults import ExpertPolicy
from config.sizes import parse_size
from server.api.access.guard import Access, require_admin
from server.api.error_bodies import GenerationFailed
from server.api.request.body import body_of
from server.api.request.common_fields import Exact, fault
from server.api.service import Service
from server.link.messages import Failed, Replan


class PlanRequest(Exact):
    """As the flags of these names; absent: as it is."""

    ram_budget: str | None = None
    expert_policy: ExpertPolicy | None = None

    @property
    def budget_bytes(self) -> int | None:
        return None if self.ram_budget is None else parse_size(self.ram_budget)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.budget_bytes is None and self.expert_policy is None:
            raise fault("ram_budget", "give 'ram_budget', 'expert_policy' or both")
        return self


def memory_router(service: Service, access: Access) -> APIRouter:
    """For admins."""
    router = APIRouter(prefix="/memory", dependencies=[Depends(require_admin(access))])
    Body = Annotated[PlanRequest, Depends(body_of(PlanRequest))]

    @router.post("/plan", status_code=202)
    async def change_plan(body: Body) -> dict[str, Any]:
        service.model_info()
        name = f"plan-{secrets.token_hex(10)}"
        answer = await service.engine.replan(Replan(name, body.budget_bytes, body.expert_policy))
        if isinstance(answer, Failed):
            raise GenerationFailed.from_event(answer)
        return {"data": {"status": "accepted", "expert_policy": answer.expert_policy} | answer.plan}

    return router
