"""The ASGI middlewares that stand before every route, outermost first: unread bodies, log and headers, access, body.

Starlette's own do not fit: TrustedHostMiddleware cannot read IPv6 hosts, and none bounds a body by size and time. All
answer in the form of the API (:mod:`s2p_deploy.serve.http.problems`).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from s2p_deploy.serve.http.problems import (
    CLIENT_LEFT,
    Problem,
    RequestProblem,
    printable,
    problem_of,
    problem_response,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from s2p_deploy.serve.http.images import HttpLimits
    from s2p_deploy.serve.http.metrics import Metrics

LOG = logging.getLogger("s2p_deploy.serve")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_ID_HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_NO_TOKEN = frozenset({"/", "/health/live", "/health/ready"})  # and what is below /page/: for probes and browsers
_PAGE = "/page/"
_METHODS = frozenset({"POST", "PUT"})  # whose bodies are read


class UnreadBodyMiddleware:
    """Answers whoever is refused before the body was read so that the answer arrives, and closes the connection.

    Most clients send the whole body before they read anything. A connection that is closed while they send is reset,
    and the answer is lost with it: what still comes is read on and dropped, as much of it and as long as ``limits``
    allow (``refused_bytes``, ``body_seconds``).
    """

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on; holds the end of an answer back while the body of the request comes."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        unread, held = True, False

        async def receive_counted() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body", False))
            return message

        async def send_but_the_end(message: Message) -> None:
            nonlocal held
            if unread and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            held = unread and message["type"] == "http.response.body" and not message.get("more_body", False)
            await send({**message, "more_body": True} if held else message)

        await self._app(scope, receive_counted, send_but_the_end)
        if held:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.body_seconds):
                    await _drop_body(receive, self._limits.refused_bytes)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class RequestLogMiddleware:
    """Gives every request an id, a line in the log and a count, and every response its id and security headers.

    The id that a client sends is kept where it is 1 to 64 letters, digits and ``._:-``. Prompts are not logged.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, with its id in ``scope["state"]["request_id"]``; a defect is answered 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get(_ID_HEADER, "")
        request_id = sent_id if _ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), CLIENT_LEFT

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[_ID_HEADER] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # the client learns no more than the id
            LOG.exception("%s failed", request_id)
            if status == CLIENT_LEFT:
                await problem_response(problem_of(error), scope)(scope, receive, send_with_headers)
            status = 500
        finally:
            self._metrics.count_response(status)
            _log(scope, status, time.monotonic() - start)


class AuthMiddleware:
    """Refuses pages of other sites, and where there is a token, whoever does not bring it.

    A page of another site that is open on the same machine can send requests to a loopback server. Its Origin header
    gives it away, and its Host header where the site's name was rebound to 127.0.0.1. ``hosts`` are the names that a
    Host header may have (None: any).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401 or 403."""
        problem = None
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            problem = self._cross_site(headers) or self._unauthorized(scope, headers)
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem_response(problem, scope)(scope, receive, send)

    def _cross_site(self, headers: Headers) -> Problem | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return Problem(403, "this server answers to loopback names only (the Host header says another)")
        if origin is not None and _netloc(origin) != host.lower():
            return Problem(403, "requests from pages of other sites are refused (the Origin header names one)")
        return None

    def _unauthorized(self, scope: Scope, headers: Headers) -> Problem | None:
        path, reads = scope["path"], scope["method"] in {"GET", "HEAD"}
        if self._token is None or (reads and (path in _NO_TOKEN or path.startswith(_PAGE))):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return None
        challenge = (("www-authenticate", "Bearer"),)
        return Problem(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key", headers=challenge)


class Uploads:
    """Paths, or beginnings of paths, whose bodies are files: they may be longer, and few of them are read at once.

    Args:
        paths: what the paths begin with.
        most_bytes: of a body.
        seconds: that a body may take.
        at_once: how many are read at once.
        above: bytes; bodies that announce no more than these are none.
        until_answered: counts a body as read when its request is answered, for what takes memory until then.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        most_bytes: int,
        seconds: float,
        at_once: int,
        *,
        above: int = 0,
        until_answered: bool = False,
    ) -> None:
        self.most_bytes, self.seconds, self.until_answered = most_bytes, seconds, until_answered
        self._paths, self._at_once, self._above = paths, at_once, above
        self._reading = 0

    def has(self, scope: Scope) -> bool:
        """Returns whether a request's body is such a file."""
        if scope["method"] not in _METHODS or not scope["path"].startswith(self._paths):
            return False
        length = _announced(scope)
        return length is None or length > self._above

    @contextmanager
    def place(self) -> Iterator[None]:
        """Takes one of the places for bodies that are read. Raises RequestProblem where all are taken."""
        if self._reading >= self._at_once:
            message, waited = f"{self._reading} uploads are read already: try again", (("retry-after", "1"),)
            raise RequestProblem(Problem(429, message, code="overloaded", headers=waited))
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1


class BodyLimitMiddleware:
    """Reads a request's body to its end, as long and as slow as the limits allow, before a route sees the request."""

    def __init__(self, app: ASGIApp, limits: HttpLimits, uploads: Sequence[Uploads] = ()) -> None:
        self._app, self._limits, self._uploads = app, limits, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its whole body, or answers 413, 408 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as places:
            try:
                body = await self._read(scope, receive, places)
            except (RequestProblem, TimeoutError) as error:
                late = Problem(408, "the body came too slowly")
                problem = error.problem if isinstance(error, RequestProblem) else late
                await problem_response(problem, scope)(scope, receive, send)
                return
            if body is None:
                return
            unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            del body  # not kept while the picture is drawn

            async def receive_body() -> Message:
                return unread.pop() if unread else await receive()  # after the body: that the client has left

            await self._app(scope, receive_body, send)

    async def _read(self, scope: Scope, receive: Receive, places: ExitStack) -> bytes | None:
        """Returns the body, None where the client left before it ended; raises TimeoutError where it is too slow.

        A place that the request needs until it is answered is left to ``places``.
        """
        upload = next((one for one in self._uploads if one.has(scope)), None)
        if upload is None:
            async with asyncio.timeout(self._limits.body_seconds):
                return await _body(scope, receive, self._limits.body_bytes)
        with ExitStack() as reading:
            (places if upload.until_answered else reading).enter_context(upload.place())
            async with asyncio.timeout(upload.seconds):
                return await _body(scope, receive, upload.most_bytes)


async def _body(scope: Scope, receive: Receive, most: int) -> bytes | None:
    too_long = RequestProblem(Problem(413, f"the body may have {most} bytes"))
    if (_announced(scope) or 0) > most:
        raise too_long
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:  # a body in chunks announces no length
            raise too_long
        if not message.get("more_body", False):
            return bytes(body)


async def _drop_body(receive: Receive, most: int) -> None:
    """Reads a body until it ends, the client leaves, or more than ``most`` bytes came."""
    more = True
    while more and most >= 0:
        message = await receive()
        most -= len(message.get("body", b""))
        more = message.get("more_body", False)


def _has_body(scope: Scope) -> bool:
    return bool(_announced(scope)) or "transfer-encoding" in Headers(scope=scope)


def _announced(scope: Scope) -> int | None:
    """Parses the bytes that a body is to have; None where the client does not say."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length[:20]) if length.isdecimal() else None


def note(scope: Scope, text: str) -> None:
    """Appends to the request's line in the log; only what the server knows, never what a client wrote."""
    scope["state"]["note"] = text


def _log(scope: Scope, status: int, seconds: float) -> None:
    state, path = scope["state"], printable(scope["path"])
    noted = f", {state['note']}" if "note" in state else ""
    level = logging.INFO if scope["method"] == "POST" or status not in {200, 503} else logging.DEBUG  # not probes
    LOG.log(level, "%s %s %s %d, %.3f s%s", state["request_id"], scope["method"], path, status, seconds, noted)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    """Parses host and port of an origin; None where there are none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
