"""A real server on a free port, in a thread of this process, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.serve.http.app import create_app
from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.http.middleware import LOOPBACK
from s2p_deploy.serve.http.models import ServedModels
from s2p_deploy.serve.http.server import DrainingServer, listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from s2p_deploy.serve.service import ImageService

PROMPT = "a large red circle at the top left, white background"
STEPS = 3
SOME_STEPS = 150  # enough to ask for something else meanwhile
MANY_STEPS = 900  # more than a second's worth
IMAGES = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:  # noqa: ANN401 - JSON
        return json.loads(self.body)


@dataclass(frozen=True)
class LiveServer:
    """A server that runs."""

    port: int
    models: ServedModels
    metrics: Metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own; ``x_request_id="a"`` is the header ``x-request-id: a``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): text for name, text in got.getheaders()}, got.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def draw(self, headers: Mapping[str, str] | None = None, **form: object) -> Answer:
        """Asks for a picture of few steps unless the form says otherwise."""
        wish = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 7} | form
        given = {"content_type": "application/json"} | dict(headers or {})
        return self.ask("POST", IMAGES, json.dumps(wish).encode(), **given)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where there is none yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_for(self, found: Callable[[], bool], seconds: float = 20) -> None:
        """Until something is so."""
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)


@contextmanager
def live_server(
    openings: Mapping[str, Callable[[], ImageService]],
    limits: HttpLimits | None = None,
    *,
    metrics: Metrics | None = None,
    token: str | None = None,
    ready: bool = True,
) -> Iterator[LiveServer]:
    """Serves models until the context is left; with ``ready``, from when they are loaded, or raises why not."""
    listening, models, metrics = listen("127.0.0.1", 0), ServedModels(openings), metrics or Metrics()
    limits = limits or HttpLimits(steps=MANY_STEPS)
    server = DrainingServer(create_app(models, limits, metrics, hosts=LOOPBACK, token=token), models, limits, 5)
    live = LiveServer(listening.socket.getsockname()[1], models, metrics)  # the port, while the socket is surely open
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening.socket]})
    thread.start()
    try:
        if ready:
            live.wait_for(lambda: models.state == "ready" or models.failure is not None, 60)
        if ready and models.failure is not None:
            raise models.failure
        yield live
    finally:
        server.should_exit = True
        thread.join()
