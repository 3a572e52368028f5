"""What can be asked of the prefix cache, and changed: /cache/explain, /cache/stats, /cache/pin, /cache/pins,
/cache/clear.

The engine makes the changes, and answers with what came of them.
"""

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request

from config.errors import RequestError
from server.api.access.guard import Access, require_admin
from server.api.access.keys import Key
from server.api.access.receipts import Caller, holder_of
from server.api.answer.json_answer import while_connected
from server.api.error_bodies import GenerationFailed
from server.api.prompt.explain import MAX_EXPLANATIONS
from server.api.prompt.replay import prompt_of
from server.api.request.body import body_of
from server.api.request.chat_schema import ChatRequest
from server.api.request.turns import Presence
from server.api.request.workload import lease_of
from server.api.service import Service
from server.link.messages import Administer, Administered, Failed

# What is said where an act would change nothing.
NOTHING = {
    "pin": "nothing of these {count} tokens is saved on disk in whole blocks of 64, so nothing was pinned: "
    "have them answered once, then pin them",
    "unpin": "nothing of these {count} tokens is pinned; GET /v1/cache/pins lists what is",
}


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
        done = await _asked(service, Administer(_name(), "clear"))
        return {"data": {"status": "accepted", "blocks": done.count}}

    @router.get("/pins", dependencies=admin)
    async def pins() -> dict[str, Any]:
        service.model_info()
        decode = service.dialect.tokenizer.decode
        return {
            "data": [
                {
                    "tokens": one.num_tokens,
                    "bytes": one.num_bytes,
                    "begins": decode(one.first_tokens),
                    "ends": decode(one.last_tokens),
                }
                for one in (await _asked(service, Administer(_name(), "pins"))).pins
            ]
        }

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
        work = lease_of(request).run(holder_of(request), lambda presence: _prompt(service, body, presence))
        prompt = await while_connected(request, work)
        key: Key = request.state.key
        done = await _asked(service, Administer(_name(), action, tuple(prompt), key.cache_group))
        if not done.count:
            raise RequestError(NOTHING[action].format(count=len(prompt)), param="messages")
        counts = {"prompt_tokens": len(prompt), "blocks": done.count}
        return {"data": {"status": "accepted"} | counts}

    return router


async def _asked(service: Service, command: Administer) -> Administered:
    """What the engine answers. Raises GenerationFailed."""
    answer = await service.engine.administer(command)
    if isinstance(answer, Failed):
        raise GenerationFailed.from_event(answer)
    return answer


def _name() -> str:
    return f"cache-{secrets.token_hex(10)}"


def _prompt(service: Service, body: ChatRequest, presence: Presence) -> list[int]:
    """What a chat with this body begins with: its tools and messages."""
    service.model_info()
    check = service.check_length(presence, None)
    return prompt_of(service.dialect.tokenizer, service.dialect.template, body, check)
