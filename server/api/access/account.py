"""What OpenRouter's clients ask about their account: keys, credits, generations, providers.

Nothing costs anything here, and the answers say so in the shapes that strict clients accept. Beside them
stands what OpenRouter would have charged, and what is left of a quota.
"""

from typing import Any

from fastapi import APIRouter, Request

from config.errors import RequestError
from config.prices import PRICES_OF
from server.api.access.receipts import Caller
from server.api.error_bodies import PROVIDER
from server.api.service import Service

PERIODS = ("", "_daily", "_weekly", "_monthly")


def account_router(service: Service) -> APIRouter:
    """Read-only. An admin is told of all accounts, everybody else of their own."""
    router = APIRouter()

    @router.get("/key")
    @router.get("/auth/key")
    async def get_key(request: Request) -> dict[str, Any]:
        key, accounts = request.state.key, service.ledger.accounts
        quota = {
            limit: {"limit": amount, "used": accounts.used(key.account, limit)}
            for limit, amount in key.quota.limits.items()
        }
        return {"data": _key_card(key.name) | {"quota": quota}}

    @router.get("/credits")
    async def get_credits(request: Request) -> dict[str, Any]:
        key, ledger = request.state.key, service.ledger
        cost = ledger.openrouter_cost if key.is_admin else ledger.cost_of(key.account)
        saved = {"openrouter_cost": round(cost, 6), "prices_of": PRICES_OF}
        return {"data": {"total_credits": 0, "total_usage": 0} | saved}

    @router.get("/generation")
    async def get_generation(request: Request, id: str = "") -> dict[str, Any]:
        owner, found = service.ledger.find(id) or ("", None)
        if found is None or not Caller.of(request).may_see(owner):
            message = f"there is no finished generation {id[:100]!r}; the last few thousand are kept"
            raise RequestError(message, status=404, error_type="not_found", param="id")
        return {"data": found}

    @router.get("/providers")
    async def list_providers() -> dict[str, Any]:
        provider = {
            "name": PROVIDER,
            "slug": PROVIDER,
            "privacy_policy_url": None,
            "terms_of_service_url": None,
            "status_page_url": None,
            "headquarters": None,
            "datacenters": None,
        }
        return {"data": [provider]}

    return router


def _key_card(name: str) -> dict[str, Any]:
    used = {f"{kind}usage{period}": 0 for kind in ("", "byok_") for period in PERIODS}
    nothing = ("limit", "limit_remaining", "limit_reset", "creator_user_id", "organization_id")
    return {
        "label": name,
        **dict.fromkeys((*nothing, "workspace_id", "effective_budget")),
        **used,
        "include_byok_in_limit": False,
        "is_free_tier": False,
        "is_management_key": False,
        "is_provisioning_key": False,
        "budgets": [],
        "allowed_data_regions": ["global"],
        "free_model_daily_requests": {"limit": 0, "used": 0, "remaining": 0},
        "rate_limit": {"requests": -1, "interval": "10s", "note": "unused"},
    }
