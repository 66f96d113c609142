"""Where a server listens."""

from __future__ import annotations

import socket

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.serve.http.server import listen


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "url", "loopback"),
    [("127.0.0.1", "http://127.0.0.1:", True), ("0.0.0.0", "http://0.0.0.0:", False), ("::1", "http://[::1]:", True)],
)
def test_it_says_where_it_is_and_who_can_reach_it(host: str, url: str, loopback: bool) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    found = listen(host, 0)
    with found.socket:
        assert found.url == f"{url}{found.socket.getsockname()[1]}"
        assert found.is_loopback is loopback
        socket.create_connection(found.socket.getsockname()[:2], timeout=5).close()


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("x" * 70, 0), ("no such host", 0)])
def test_where_it_cannot_listen_is_one_line(host: str, port: int) -> None:
    with pytest.raises(InputError, match=r"cannot listen on .* choose another --host or --port"):
        listen(host, port)
