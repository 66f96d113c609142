"""Two replicas on the CPU: the same pictures, and a death that costs nobody an answer."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.engines import load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Schedule, generate, pipeline_with_engine
from s2p_deploy.records import Prompt
from s2p_deploy.serve.observer import Unobserved
from s2p_deploy.serve.request import ClosingError, GivenUpError, ImageRequest, LateError, OverloadedError
from s2p_deploy.serve.service import ServiceSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from s2p_deploy.serve.ray.service import RayService
    from tests.serve.conftest import Tiny

psutil = pytest.importorskip("psutil")

pytestmark = [
    pytest.mark.slow,
    # not imported here: Ray reads whether there are tokens when it is
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: s2p-deploy[ray]"),
]

PROMPT, GUIDANCE = "a large red circle, white background", 2.0
REPLICAS, ACTIVE, WAITING = 2, 4, 8
ROOM = REPLICAS * ACTIVE + WAITING
MOST = 25  # steps that the engine's table covers


@pytest.fixture(scope="module")
def service(tiny: Tiny) -> Iterator[RayService]:
    from s2p_deploy.serve.ray.run import RaySettings, open_ray_service

    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    settings, replicas = ServiceSettings(max_active=ACTIVE, max_waiting=WAITING), RaySettings(REPLICAS, cpus=0.5)
    with ThreadPoolExecutor(1) as pool:  # a server loads in a thread too, and that thread may end
        opening = pool.submit(open_ray_service, tiny.engine, tiny.base, settings, Unobserved(), "tiny", replicas)
        opened = opening.result()
    yield opened
    drains(opened)
    opened.close()
    os.environ.clear()
    os.environ.update(before)


def drains(service: RayService) -> None:
    """What is left is drawn before the end; after that nothing more is taken, so this comes after all tests."""
    ticket = service.submit(asked(MOST), timeout=120)
    assert service.drain(120)
    assert ticket.picture.result(timeout=1).size == (64, 64)
    with pytest.raises(ClosingError):
        service.submit(asked(), timeout=60)


def asked(steps: int = 4, seed: int = 0) -> ImageRequest:
    return ImageRequest(PROMPT, steps, GUIDANCE, seed)


def drawn_here(tiny: Tiny, request: ImageRequest) -> NDArray[np.uint8]:
    torch.set_num_threads(1)  # as the replicas have: text encoder and VAE round differently with more
    with load_engine(tiny.engine) as runner:
        pipe = pipeline_with_engine(load_pipeline(tiny.base), tiny.engine, runner)
        schedule = Schedule(request.steps)
        picture = generate(pipe, Prompt("p", PROMPT), schedule=schedule, guidance_scale=GUIDANCE, seed=request.seed)
        return np.asarray(picture)


def processes(without: int = 0) -> set[int]:
    """Of both replicas; waits until there are two, neither of them ``without``."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        children = psutil.Process().children(recursive=True)
        found = {child.pid for child in children if _is_replica(child)} - {without}
        if len(found) == REPLICAS:
            return found
        time.sleep(0.5)
    raise AssertionError("there were never two replicas")


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica:tiny" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_picture_is_the_one_that_generate_draws(service: RayService, tiny: Tiny) -> None:
    requests = [asked(steps, seed) for steps, seed in ((4, 1), (9, 2), (6, 3), (4, 4))]
    tickets = [service.submit(request, timeout=120) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        np.testing.assert_array_equal(np.asarray(ticket.picture.result()), drawn_here(tiny, request))


def test_the_service_says_what_the_replicas_draw(service: RayService, tiny: Tiny) -> None:
    assert service.facts.engine == tiny.engine.manifest.digest
    assert service.facts.size == (64, 64)
    assert service.alive


def test_a_wrong_request_is_the_clients_fault(service: RayService) -> None:
    ticket = service.submit(ImageRequest(PROMPT, 4, GUIDANCE, 0, scheduler="none"), timeout=60)
    with pytest.raises(InputError, match="none"):
        ticket.picture.result()


def test_requests_end_when_they_are_given_up_or_late(service: RayService) -> None:
    given_up = service.submit(asked(MOST), timeout=120)
    given_up.cancel()
    with pytest.raises(GivenUpError):
        given_up.picture.result(timeout=30)
    with pytest.raises(LateError):
        service.submit(asked(MOST), timeout=0.01).picture.result(timeout=30)


def test_what_finds_no_room_is_refused_at_once(service: RayService) -> None:
    tickets = [service.submit(asked(MOST, seed), timeout=300) for seed in range(ROOM)]
    with pytest.raises(OverloadedError):
        service.submit(asked(), timeout=60)
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        with suppress(GivenUpError):  # some are done already
            ticket.picture.result(timeout=60)
    assert service.submit(asked(), timeout=120).picture.result().size == (64, 64)


def test_requests_of_a_replica_that_dies_are_drawn_by_the_other(service: RayService, tiny: Tiny) -> None:
    victim = min(processes())
    requests = [asked(MOST, seed) for seed in range(ROOM)]
    tickets = [service.submit(request, timeout=240) for request in requests]
    time.sleep(0.1)
    assert service.active > ROOM // 2
    os.kill(victim, signal.SIGKILL)
    for request, ticket in zip(requests, tickets, strict=True):
        np.testing.assert_array_equal(np.asarray(ticket.picture.result(timeout=240)), drawn_here(tiny, request))
    assert victim not in processes(without=victim)


def test_nobody_joins_the_cluster_without_its_token(service: RayService) -> None:
    import ray

    assert service.alive
    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('joined', ray.nodes())"
    stranger = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
    command = [sys.executable, "-c", join]
    finished = subprocess.run(command, check=False, env=stranger, capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert "joined" not in finished.stdout
