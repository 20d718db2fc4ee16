"""The page `GET /flashmemory`: three files, the same for everybody, that ask our other routes from the browser."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

WEB = Path(__file__).parents[1] / "web"
_HEADERS = {
    "Cache-Control": "no-cache",
    # The page needs nothing from anywhere else, so that nothing else can be brought into it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

page_router = APIRouter(prefix="/flashmemory", include_in_schema=False)


@page_router.get("")
def page() -> FileResponse:
    """The page."""
    return FileResponse(WEB / "index.html", media_type="text/html", headers=_HEADERS)


@page_router.get("/app.js")
def script() -> FileResponse:
    """What it does."""
    return FileResponse(WEB / "app.js", media_type="text/javascript", headers=_HEADERS)


@page_router.get("/style.css")
def style() -> FileResponse:
    """What it looks like."""
    return FileResponse(WEB / "style.css", media_type="text/css", headers=_HEADERS)
