"""Ids and the log; who may use the server: loopback names, own pages, the token; bodies that are too long or slow."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.http.middleware import LOG
from s2p_deploy.serve.request import ImageRequest, RequestFuture
from s2p_deploy.serve.service import ImageService
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import IMAGES, PROMPT, LiveServer, live_server

TOKEN = "a-token-of-some-length"
OPEN = ("/", "/page/page.js", "/health/live", "/health/ready")
CLOSED = ("/v1/models", "/metrics", "/openapi.json", "/nothing")
HEAD = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level(logging.DEBUG, LOG.name)
    return caplog


@pytest.mark.parametrize("given", ["a", "My-Id_1.2:3", "x" * 64])
def test_a_clients_id_comes_back(server: LiveServer, given: str) -> None:
    assert server.get("/health/ready", x_request_id=given).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a;b", "<script>", "ü"])
def test_an_id_that_is_none_is_replaced(server: LiveServer, given: str) -> None:
    found = server.get("/health/ready", x_request_id=given).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", found)


def test_a_line_says_what_was_done_and_nothing_of_the_prompt(
    server: LiveServer, lines: pytest.LogCaptureFixture
) -> None:
    server.draw({"x_request_id": "mine"}, n=2)
    server.wait_for(lambda: any(line.startswith("mine ") for line in lines.messages))
    found = [line for line in lines.messages if line.startswith("mine ")]
    assert len(found) == 1
    assert re.fullmatch(r"mine POST /v1/images/generations 200, [\d.]+ s, 2 x 3 steps", found[0])
    assert PROMPT not in lines.text


def test_a_path_cannot_write_lines(server: LiveServer, lines: pytest.LogCaptureFixture) -> None:
    server.get("/%0d%0a2026-01-01%20INFO%20all%20is%20well%1b[31m")
    said = "GET /  2026-01-01 INFO all is well [31m 404"
    server.wait_for(lambda: any(said in line for line in lines.messages))  # written once the answer is sent
    assert not [line for line in "\n".join(lines.messages).splitlines() if line.startswith("2026-01-01")]


def test_a_defect_is_500_described_in_the_log_alone(
    opening: Opening, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(_self: ImageService, request: ImageRequest, *, timeout: float, id: str) -> RequestFuture:  # noqa: A002
        raise RuntimeError(f"secret of {request.prompt}, {timeout}, {id}")

    with live_server({"small": opening("small", Metrics())}) as server:
        monkeypatch.setattr(ImageService, "submit", submit)
        found = server.draw({"x_request_id": "mine"})
        assert (found.status, found.data["error"]["request_id"]) == (500, "mine")
        assert b"secret" not in found.body
        assert "secret" in lines.text
        assert "mine failed" in lines.text
        assert server.get("/health/ready").status == 200


@pytest.fixture(scope="module")
def closed(opening: Opening) -> Iterator[LiveServer]:
    metrics = Metrics()
    with live_server({"small": opening("small", metrics)}, metrics=metrics, token=TOKEN) as live:
        yield live


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:{port}", "LOCALHOST:1", "[::1]:80"])
def test_loopback_names_are_answered(server: LiveServer, host: str) -> None:
    assert server.get("/health/ready", host=host.format(port=server.port)).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", "", "a@b@c:x"])
def test_other_names_are_not(server: LiveServer, host: str) -> None:
    found = server.get("/v1/models", host=host)
    assert (found.status, found.data["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
def test_pages_of_other_sites_are_refused(server: LiveServer, origin: str) -> None:
    assert server.draw({"origin": origin}).status == 403
    assert server.draw({"origin": server.url}).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_a_body_must_say_that_it_is_json(server: LiveServer, kind: str) -> None:
    found = server.draw({"content_type": kind})
    assert (found.status, found.data["error"]["type"]) == (415, "invalid_request_error")


def test_a_body_must_not_be_compressed(server: LiveServer) -> None:
    assert server.draw({"content_encoding": "gzip"}).status == 415


@pytest.mark.parametrize("path", CLOSED)
def test_without_the_token_nothing_is_told(closed: LiveServer, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Basic x"}):
        found = closed.get(path, **headers)
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer")
    assert closed.get(path, authorization=f"Bearer {TOKEN}").status == (404 if path == "/nothing" else 200)


def test_without_the_token_nothing_is_drawn(closed: LiveServer) -> None:
    assert closed.draw().status == 401
    assert closed.ask("POST", "/health/ready").status == 401
    assert closed.draw({"authorization": f"bearer {TOKEN}"}).status == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_the_page_need_no_token(closed: LiveServer, path: str) -> None:
    assert closed.get(path).status == 200


def test_the_page_may_run_its_own_scripts_only(server: LiveServer) -> None:
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert server.get("/").headers["x-content-type-options"] == "nosniff"
    assert server.get(IMAGES).status == 405


@pytest.fixture(scope="module")
def narrow(opening: Opening) -> Iterator[LiveServer]:
    metrics, limits = Metrics(), HttpLimits(body_bytes=1000, body_seconds=0.3)
    with live_server({"small": opening("small", metrics)}, limits, metrics=metrics) as live:
        yield live


def answer_to(server: LiveServer, *parts: bytes) -> bytes:
    """The status line of the answer to what is sent; nothing more is sent, and the connection stays open."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        for part in parts:
            opened.sendall(part)
        return opened.recv(1000).partition(b"\r\n")[0]


def test_a_body_within_the_limit_is_read(narrow: LiveServer) -> None:
    assert narrow.draw(prompt="x" * 800).status == 200


def test_a_length_beyond_the_limit_is_refused_before_it_is_sent(narrow: LiveServer) -> None:
    assert b" 413 " in answer_to(narrow, f"{HEAD}content-length: 1001\r\n\r\n".encode())
    assert b" 413 " in answer_to(narrow, f"{HEAD}content-length: {10**18}\r\n\r\n".encode())


def test_a_body_in_chunks_is_counted(narrow: LiveServer) -> None:
    chunk = b"1f4\r\n" + b" " * 500 + b"\r\n"
    start = f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()
    assert b" 413 " in answer_to(narrow, start, chunk, chunk, chunk)


def test_a_body_that_does_not_come_is_408(narrow: LiveServer) -> None:
    assert b" 408 " in answer_to(narrow, f"{HEAD}content-length: 100\r\n\r\n".encode(), b"{")


def test_clients_that_send_all_before_they_read_hear_why_they_are_refused(server: LiveServer) -> None:
    body = b'{"prompt": "' + b"x" * (20 * 2**20) + b'"}'
    found = server.ask("POST", IMAGES, body, content_type="application/json")
    assert (found.status, found.data["error"]["message"]) == (413, f"the body may have {2**20} bytes")
    request = urllib.request.Request(server.url + IMAGES, body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=60):
        pass
    with refused.value as answer:
        assert (answer.code, json.load(answer)["error"]["type"]) == (413, "invalid_request_error")


def test_clients_without_the_token_hear_it_too(closed: LiveServer) -> None:
    request = urllib.request.Request(closed.url + IMAGES, b" " * (20 * 2**20), {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=60):
        pass
    with refused.value as answer:
        assert answer.code == 401


def test_a_refused_body_is_not_read_for_ever(server: LiveServer, narrow: LiveServer) -> None:
    """Of a longer one the server reads a part; of one that does not come, nothing after a time."""
    head, part, sent = f"{HEAD}content-length: {10**12}\r\n\r\n".encode(), bytes(2**20), 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened, contextlib.suppress(OSError):
        opened.sendall(head)
        while sent < 2**28:
            opened.sendall(part)
            sent += len(part)
    assert sent < 2**28
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as opened:
        start = time.monotonic()
        opened.sendall(head)
        answer = b"".join(iter(lambda: opened.recv(4096), b""))
        assert time.monotonic() - start < 5
    assert b" 413 " in answer.partition(b"\r\n")[0]
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_the_server_goes_on_afterwards(narrow: LiveServer) -> None:
    assert narrow.draw().status == 200
