"""Bodies that are too long or too slow."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from s2p_deploy.serve.http.limits import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from tests.serve.http.conftest import Opening
from tests.serve.http.live_server import IMAGES, LiveServer, live_server

HEAD = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


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


def test_the_server_goes_on_afterwards(narrow: LiveServer) -> None:
    assert narrow.draw().status == 200
