"""What happens now: GET /activity, the numbers behind the page, and a way to end a request.

Callers see and end their own requests, admins all of them.
"""

import math
from base64 import b64encode
from typing import Any

from fastapi import APIRouter, Request

from config.errors import RequestError
from config.prices import PRICES_OF
from server.api.access.keys import Key
from server.api.access.receipts import Caller
from server.api.admin.metrics import shares
from server.api.answer.answer import Answer
from server.api.service import Service
from server.api.watch.history import History
from server.api.watch.record import RequestRecord
from server.api.watch.watch import Watch
from server.version import VERSION


def activity_router(service: Service, watch: Watch, history: History) -> APIRouter:
    """Cancelling is asked of the engine; the request's client is told that it was cancelled."""
    router = APIRouter(prefix="/activity")

    @router.get("")
    async def list_activity(request: Request) -> dict[str, Any]:
        key, caller = request.state.key, Caller.of(request)
        mine = [one for one in watch.generations if _may_see(key, caller, one)]
        status = service.engine.status
        return {
            "data": [_described(one) for one in mine],
            "state": status.state,
            "reason": status.text,
            "model": service.model_id,
            "is_admin": key.is_admin,
        }

    @router.get("/machine")
    async def describe_machine(request: Request) -> dict[str, Any]:
        _refuse_others(request)
        return {"data": _machine(service) | {"minutes": history.minutes()}}

    @router.get("/experts")
    async def map_experts(request: Request) -> dict[str, Any]:
        _refuse_others(request)
        stats = service.engine.status.stats
        return {
            "data": [
                {"layer": layer, "hits": hits, "misses": misses, "cells": b64encode(cells).decode()}
                for layer, (hits, misses, cells) in sorted(stats.heat.items() if stats else ())
            ]
        }

    @router.post("/{request_id}/cancel", status_code=202)
    async def cancel(request: Request, request_id: str) -> dict[str, Any]:
        key, caller, found = request.state.key, Caller.of(request), watch.find(request_id)
        if found is None or not found.is_generation or not _may_see(key, caller, found):
            message = f"there is no request {request_id[:100]!r} under way"
            raise RequestError(message, status=404, error_type="not_found")
        found.cancelled_by = key.name
        for answer in found.answers:
            answer.cancel()
        return {"data": {"id": found.id, "status": "cancelled"}}

    return router


def _refuse_others(request: Request) -> None:
    if not request.state.key.is_admin:
        message = "these numbers are for admins; /activity lists your own requests"
        raise RequestError(message, status=403, error_type="permission_denied")


def _may_see(key: Key, caller: Caller, record: RequestRecord) -> bool:
    return key.is_admin or record.owner == caller.owner


def _described(record: RequestRecord) -> dict[str, Any]:
    used, answer = record.tokens, _current(record)
    return {
        "id": record.id,
        "agent": record.agent,
        "key": record.key_name,
        "route": record.path,
        "phase": answer.phase,
        "queue_place": answer.num_before,
        "prompt_tokens": len(answer.request.token_ids),
        "prefilled_tokens": answer.num_prefilled,
        "cached_tokens": used.num_cached_tokens,
        "new_tokens": used.num_completion_tokens,
        "max_new_tokens": answer.request.max_tokens,
        "eta_s": answer.eta_s,
        "seconds": round(record.seconds, 2),
        "first_token_s": record.first_s,
        "tokens_per_s": record.decode_rate,
    }


def _current(record: RequestRecord) -> Answer:
    """The answer that is furthest from its end."""
    return next((one for one in record.answers if one.reason is None), record.answers[-1])


def _machine(service: Service) -> dict[str, Any]:
    status = service.engine.status
    values = status.stats.values if status.stats else {}
    info = status.info
    return {
        "version": VERSION,
        "model": service.model_id,
        "state": status.state,
        "reason": status.text,
        "progress": round(status.fraction, 3),
        "context_length": info.context_length if info else None,
        "restarts": status.num_restarts,
        "counts": {name: value for name, value in values.items() if math.isfinite(value) and "." not in name},
        "hit_rates": {name: found / asked for name, (found, asked, _) in shares(values).items() if asked},
        "memory": {
            kind: {
                name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{kind}.")
            }
            for kind in ("planned", "used")
        },
        "openrouter_dollars": round(service.ledger.openrouter_cost, 6),
        "prices_of": PRICES_OF,
    }
