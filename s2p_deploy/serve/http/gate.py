"""Who may ask at all: no other site's pages, and where there is a token, who brings it.

A page of another site that is open on the same machine can send requests to a loopback server. Its Origin header gives
it away, and its Host header where the site's name was bound anew to 127.0.0.1.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from s2p_deploy.serve.http.problems import Problem, problem_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_OPEN = frozenset({"/", "/health", "/v2/health/live", "/v2/health/ready"})
_PAGE = "/page/"
_READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Doorkeeper:
    """``hosts`` are the names that a Host header may say (None: any), ``token`` what a client must bring."""

    hosts: frozenset[str] | None = None
    token: str | None = None

    def problem(self, scope: Scope) -> Problem | None:
        """Why a request is refused."""
        headers = Headers(scope=scope)
        return self._foreign(headers) or self._unknown(scope, headers)

    def _foreign(self, headers: Headers) -> Problem | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _name_of(host) not in self.hosts:
            return Problem(403, "this server answers to loopback names only (the Host header says another)")
        if origin is not None and _place_of(origin) != host.lower():
            return Problem(403, "requests from pages of other sites are refused (the Origin header names one)")
        return None

    def _unknown(self, scope: Scope, headers: Headers) -> Problem | None:
        path = scope["path"]
        if self.token is None or (scope["method"] in _READING and (path in _OPEN or path.startswith(_PAGE))):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        challenge = (("www-authenticate", "Bearer"),)
        return Problem(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key", headers=challenge)


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app, self._doorkeeper = app, doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        problem = self._doorkeeper.problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem_response(problem, scope)(scope, receive, send)


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _place_of(origin: str) -> str | None:
    """Host and port of an origin; None where it is none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
