"""The page at ``/``: three files of this package, and nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from s2p_deploy.serve.http.problems import Problem, RequestProblem

_TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "picture.js": "text/javascript",
}


def page_routes() -> APIRouter:
    """``/`` and ``/page/NAME``."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("s2p_deploy") / "serve" / "http" / "page"
    files = {name: (folder / name).read_bytes() for name in _TYPES}

    @router.get("/")
    async def index() -> Response:
        """The page."""
        return Response(files["index.html"], media_type=_TYPES["index.html"])

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        """Its style and its scripts."""
        if name not in files:
            raise RequestProblem(Problem(404, "there is no such file"))
        return Response(files[name], media_type=_TYPES[name])

    return router
