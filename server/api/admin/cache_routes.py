"""What can be asked of the prefix cache, and changed: /cache/explain, /cache/stats, /cache/pin, /cache/clear.

Changes are passed on to the engine, which answers nothing: the counts that come with the
next request show them.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request

from config.errors import RequestError
from server.api.access.guard import Access, require_admin
from server.api.access.keys import Key
from server.api.access.receipts import Caller, holder_of
from server.api.answer.json_answer import while_connected
from server.api.prompt.explain import MAX_EXPLANATIONS
from server.api.prompt.replay import prompt_of
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.request.turns import Presence
from server.api.request.workload import lease_of
from server.api.service import Service
from server.link.messages import Administer


def cache_router(service: Service, access: Access) -> APIRouter:
    """For admins, but for /explain: that tells everybody of their own prompts."""
    router = APIRouter(prefix="/cache")
    Body = Annotated[ChatRequest, Depends(body_of(ChatRequest))]
    admin = [Depends(require_admin(access))]

    @router.get("/explain")
    async def explain(request: Request, id: str = "") -> dict[str, Any]:
        found = service.explainer.find(id)
        if found is None or not Caller.of(request).may_see(found.caller.owner):
            message = f"there is no prompt {id[:100]!r} among the last {MAX_EXPLANATIONS} chats"
            raise RequestError(message, status=404, error_type="not_found", param="id")
        return {"data": found.describe()}

    @router.get("/stats", dependencies=admin)
    async def stats() -> dict[str, Any]:
        told = service.engine.status.stats
        values = told.values if told else {}
        return {"data": {name: value for name, value in values.items() if name.startswith("prefix_")}}

    @router.post("/clear", status_code=202, dependencies=admin)
    async def clear() -> dict[str, Any]:
        service.model_info()  # where there is no engine nobody clears the disk
        service.remembered.clear()
        service.engine.administer(Administer("clear"))
        return {"data": {"status": "accepted"}}

    @router.post("/pin", status_code=202, dependencies=admin)
    async def pin(request: Request, body: Body) -> dict[str, Any]:
        return await administer(request, body, "pin")

    @router.post("/unpin", status_code=202, dependencies=admin)
    async def unpin(request: Request, body: Body) -> dict[str, Any]:
        return await administer(request, body, "unpin")

    async def administer(
        request: Request, body: ChatRequest, action: Literal["pin", "unpin"]
    ) -> dict[str, Any]:
        service.parameters.note(request, body, Caller.of(request, body.session_id, body.user))
        work = lease_of(request).run(
            holder_of(request),
            lambda presence: _administer(service, body, request.state.key, action, presence),
        )
        return await while_connected(request, work)

    return router


def _administer(
    service: Service, body: ChatRequest, key: Key, action: Literal["pin", "unpin"], presence: Presence
) -> dict[str, Any]:
    """Pin what a chat with this body begins with: its tools and messages, in whole blocks.

    Blocks are those of the key's cache group.
    """
    service.model_info()
    check = service.check_length(presence, None)
    prompt = prompt_of(service.dialect.tokenizer, service.dialect.template, body, check)
    service.engine.administer(Administer(action, tuple(prompt), key.cache_group))
    return {"data": {"status": "accepted", "prompt_tokens": len(prompt)}}
