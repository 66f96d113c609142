"""Ids, lines on stderr, and what a client learns of a defect."""

from __future__ import annotations

import logging
import re

import pytest

from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.http.picture_service import PictureService
from s2p_deploy.serve.http.request_log import LOG
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.service import ImageService
from s2p_deploy.serve.ticket import Ticket
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import PROMPT, LiveServer, live_server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level(logging.DEBUG, LOG.name)
    return caplog


@pytest.mark.parametrize("given", ["a", "My-Id_1.2:3", "x" * 64])
def test_a_clients_id_comes_back(server: LiveServer, given: str) -> None:
    assert server.get("/health", x_request_id=given).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a;b", "<script>", "ü"])
def test_an_id_that_is_none_is_replaced(server: LiveServer, given: str) -> None:
    found = server.get("/health", x_request_id=given).headers["x-request-id"]
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


class Defective:
    """A service with a defect in its way in."""

    def __init__(self, service: ImageService) -> None:
        self.facts, self.waiting, self.active, self.alive = service.facts, 0, 0, True
        self.drain, self.close = service.drain, service.close

    def submit(self, request: ImageRequest, *, timeout: float, id: str | None = None) -> Ticket:  # noqa: A002
        raise RuntimeError(f"secret of {request.prompt}, {timeout}, {id}")


def test_a_defect_is_500_told_to_the_log_alone(opening: Opening, lines: pytest.LogCaptureFixture) -> None:
    def defective() -> PictureService:
        return Defective(opening("small", Metrics())())

    with live_server({"small": defective}) as server:
        found = server.draw({"x_request_id": "mine"})
        assert (found.status, found.data["error"]["request_id"]) == (500, "mine")
        assert b"secret" not in found.body
        assert "secret" in lines.text
        assert "mine failed" in lines.text
        assert server.get("/health").status == 200
