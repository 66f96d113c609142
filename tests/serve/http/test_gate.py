"""Who may ask: loopback names, own pages, the token, and bodies of the right kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s2p_deploy.serve.http.metrics import Metrics
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import IMAGES, LiveServer, live_server

TOKEN = "a-token-of-some-length"
OPEN = ("/", "/page/page.js", "/v2/health/live", "/v2/health/ready", "/health")
CLOSED = ("/v1/models", "/metrics", "/v2", "/v2/models/small", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def closed(opening: Opening) -> Iterator[LiveServer]:
    metrics = Metrics()
    with live_server({"small": opening("small", metrics)}, metrics=metrics, token=TOKEN) as live:
        yield live


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:{port}", "LOCALHOST:1", "[::1]:80"])
def test_loopback_names_are_answered(server: LiveServer, host: str) -> None:
    assert server.get("/health", host=host.format(port=server.port)).status == 200


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
    assert closed.ask("POST", "/health").status == 401
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
