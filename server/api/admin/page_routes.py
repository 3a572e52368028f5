"""GET / and GET /docs: pages for browsers. Each is one file that asks for nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from server.api.access.guard import Access

PAGES = Path(__file__).parent.parent / "page"
# A page may ask this server, and nobody else; no other page may put it into a frame.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_router(access: Access) -> APIRouter:
    """For everybody: the pages hold no secrets, and ask for a key before they ask for anything else."""
    router = APIRouter()

    def page(name: str) -> HTMLResponse:
        text = (PAGES / name).read_text(encoding="utf-8")
        return HTMLResponse(
            text.replace("NEEDS_KEY", "no" if access.keys.is_open else "yes"), headers=HEADERS
        )

    @router.get("/", include_in_schema=False)
    async def show_activity() -> HTMLResponse:
        return page("activity.html")

    @router.get("/docs", include_in_schema=False)
    async def show_routes() -> HTMLResponse:
        return page("docs.html")

    return router
