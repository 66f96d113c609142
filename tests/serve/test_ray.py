"""Ray: no cluster without a token; two replicas on the CPU draw the same pictures, and survive a death."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.engines import load_engine
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Schedule, generate, pipeline_with_engine
from s2p_deploy.records import Prompt
from s2p_deploy.serve.http.images import HttpLimits
from s2p_deploy.serve.ray import (
    MODE,
    TOKEN,
    TOKEN_FILE,
    RaySettings,
    ReplicaSpec,
    check_ray,
    require_token,
    running_replicas,
)
from s2p_deploy.serve.service import ServiceSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.serve.conftest import Tiny

PROMPT, GUIDANCE = "a large red circle, white background", 2.0
REPLICAS, ACTIVE, WAITING = 2, 4, 8
MOST = 25  # steps that the engine's table covers
SECRET = "a-token-of-some-length"
# not imported here: Ray reads whether there are tokens when it is
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: s2p-deploy[ray]")
replicas = [pytest.mark.slow, needs_ray]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def pictures(self) -> list[NDArray[np.uint8]]:
        images = [io.BytesIO(base64.b64decode(one["b64_json"])) for one in json.loads(self.body)["data"]]
        return [np.asarray(Image.open(image)) for image in images]


class Server(NamedTuple):
    """Ray's proxy."""

    port: int

    def ask(self, method: str, path: str, form: dict[str, Any] | None = None, timeout: float = 240.0) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET}"}
        try:
            connection.request(method, path, None if form is None else json.dumps(form), headers)
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): text for name, text in got.getheaders()}, got.read())
        finally:
            connection.close()

    def draw(self, **form: object) -> Answer:
        asked = {"prompt": PROMPT, "num_inference_steps": MOST, "guidance_scale": GUIDANCE, "seed": 0} | form
        return self.ask("POST", "/v1/images/generations", asked)

    def draw_all(self, forms: list[dict[str, object]]) -> Iterator[Answer]:
        with ThreadPoolExecutor(len(forms)) as pool:
            yield from pool.map(lambda form: self.draw(**form), forms)


@pytest.fixture
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (MODE, TOKEN, TOKEN_FILE, "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("_nothing_set")
class TestToken:
    def test_a_cluster_of_its_own_gets_a_token_of_its_own(self) -> None:
        require_token(own_cluster=True)
        assert os.environ[MODE] == "token"
        assert len(os.environ[TOKEN]) == 64
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        first = os.environ[TOKEN]
        require_token(own_cluster=True)
        assert os.environ[TOKEN] == first

    def test_a_token_that_is_there_is_used(self, tmp_path: Path) -> None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x" * 64)
        require_token(own_cluster=True)
        assert TOKEN not in os.environ

    def test_a_cluster_to_join_has_one_already(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match=TOKEN):
            require_token(own_cluster=False)
        monkeypatch.setenv(TOKEN, "x" * 64)
        require_token(own_cluster=False)

    @pytest.mark.parametrize("mode", ["disabled", "", "k8s"])
    def test_token_mode_cannot_be_switched_off(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        monkeypatch.setenv(MODE, mode)
        with pytest.raises(InputError, match="RAY_AUTH_MODE=token"):
            require_token(own_cluster=True)


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"replicas": 257}, {"cpus": 0}])
def test_numbers_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="give"):
        RaySettings(**wrong)


@needs_ray
def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        check_ray(address)
    with pytest.raises(MissingEnvironmentError, match=f"no Ray cluster at {address}"):
        check_ray(address)


@needs_ray
@pytest.mark.parametrize("address", ["HOST", ":6379", "HOST:", "HOST:port", "HOST:65536", "ray://HOST"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InputError, match="must be HOST:PORT"):
        check_ray(address)


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Server]:
    """Two replicas; in the end what runs is finished before they stop."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = ServiceSettings(max_active=ACTIVE, max_waiting=WAITING)
    spec = ReplicaSpec.of(tiny.engine, tiny.base, "tiny", settings, HttpLimits(), token=SECRET)
    with ThreadPoolExecutor(8) as pool:
        with running_replicas(spec, RaySettings(REPLICAS, cpus=0.5), "127.0.0.1", port):
            yield Server(port)
            # as many as there are threads, so that all begin before the end, and one replica has room for all
            last = [pool.submit(Server(port).draw, seed=seed) for seed in range(8)]
            time.sleep(0.3)
        assert {one.result().status for one in last} == {200}
    os.environ.clear()
    os.environ.update(before)


def drawn_here(tiny: Tiny, steps: int, seed: int) -> NDArray[np.uint8]:
    torch.set_num_threads(1)  # as the replicas have: text encoder and VAE round differently with more
    with load_engine(tiny.engine) as runner:
        pipe = pipeline_with_engine(load_pipeline(tiny.base), tiny.engine, runner)
        return np.asarray(
            generate(pipe, Prompt("p", PROMPT), schedule=Schedule(steps), guidance_scale=GUIDANCE, seed=seed)
        )


def processes(without: int = 0) -> set[int]:
    """Process ids of both replicas; waits until there are two, neither of them ``without``."""
    psutil = pytest.importorskip("psutil")
    end = time.monotonic() + 240
    while time.monotonic() < end:
        found = set()
        for child in psutil.Process().children(recursive=True):
            try:
                found |= {child.pid} if "ServeReplica:tiny" in " ".join(child.cmdline()) else set()
            except psutil.Error:
                continue
        if len(found - {without}) == REPLICAS:
            return found - {without}
        time.sleep(0.5)
    raise AssertionError("there were never two replicas")


class TestReplicas:
    pytestmark = replicas

    def test_a_picture_is_the_one_that_generate_draws(self, server: Server, tiny: Tiny) -> None:
        wanted = [(4, 1), (9, 2), (6, 3), (4, 4)]
        answers = server.draw_all([{"num_inference_steps": steps, "seed": seed} for steps, seed in wanted])
        for (steps, seed), answer in zip(wanted, answers, strict=True):
            np.testing.assert_array_equal(answer.pictures[0], drawn_here(tiny, steps, seed))

    def test_every_replica_is_the_whole_application(self, server: Server, tiny: Tiny) -> None:
        (model,) = json.loads(server.ask("GET", "/v1/models").body)["data"]
        assert (model["id"], model["ready"], model["engine"]) == ("tiny", True, tiny.engine.manifest.digest)
        assert [server.ask("GET", path).status for path in ("/health/live", "/health/ready", "/", "/metrics")] == [
            200
        ] * 4
        assert server.ask("GET", "/").headers["x-content-type-options"] == "nosniff"
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 401
        events = server.draw(stream=True).body.decode()
        assert "image_generation.progress" in events
        assert "image_generation.completed" in events

    def test_what_cannot_be_drawn_or_comes_too_late_is_said(self, server: Server) -> None:
        refused = server.draw(scheduler="none")
        assert (refused.status, b"none" in refused.body) == (400, True)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET}", "x-request-timeout": "0.01"}
        connection.request("POST", "/v1/images/generations", json.dumps({"prompt": PROMPT}), headers)
        assert connection.getresponse().status == 504

    def test_what_finds_no_room_is_refused_at_once(self, server: Server) -> None:
        answers = list(server.draw_all([{"seed": seed, "n": 4} for seed in range(12)]))
        assert {answer.status for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)
        assert server.draw().status == 200

    def test_a_replica_that_dies_is_replaced_and_its_requests_can_be_asked_for_again(
        self, server: Server, tiny: Tiny
    ) -> None:
        victim = min(processes())
        with ThreadPoolExecutor(8) as pool:
            pending = [pool.submit(server.draw, seed=seed, n=2) for seed in range(8)]
            time.sleep(0.3)
            os.kill(victim, signal.SIGKILL)
            answers = [one.result() for one in pending]
        # 429: the replica that is left may have no room for what the other one had
        assert {answer.status for answer in answers} <= {200, 429, 500, 503}
        assert victim not in processes(without=victim)
        for seed, answer in enumerate(answers):
            again = answer if answer.status == 200 else server.draw(seed=seed, n=2)
            np.testing.assert_array_equal(again.pictures[0], drawn_here(tiny, MOST, seed))

    def test_nobody_joins_the_cluster_without_its_token(self, server: Server) -> None:
        import ray

        assert server.ask("GET", "/health/live").status == 200
        address = ray.get_runtime_context().gcs_address
        join = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('joined', ray.nodes())"
        stranger = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
        command = [sys.executable, "-c", join]
        finished = subprocess.run(command, check=False, env=stranger, capture_output=True, text=True, timeout=300)
        assert finished.returncode != 0
        assert "joined" not in finished.stdout
