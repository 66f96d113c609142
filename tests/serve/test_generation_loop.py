"""The request queue, and a loop whose parts fail: no request hangs, and the service says that it is not alive."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.generation_loop import Observer, RequestQueue
from s2p_deploy.serve.request import ClosingError, ImageRequest, OverloadedError, RequestFuture, StoppedError
from s2p_deploy.serve.service import ImageService, ServedEngine, ServiceSettings, load_served_engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.serve.generation_loop import Ending
    from tests.serve.conftest import Tiny

SETTINGS = ServiceSettings(batches=(2,), max_active=1)
SECONDS = 60.0


def request(seed: int = 0, steps: int = 4) -> ImageRequest:
    return ImageRequest("a red circle", steps=steps, guidance_scale=1.0, seed=seed)


def future(name: str) -> RequestFuture:
    return RequestFuture(name, request(), 4, submitted=0.0, deadline=60.0)


def full(waiting: tuple[RequestFuture, ...]) -> S2PError | None:
    """Why a queue with one place takes no more."""
    return OverloadedError(len(waiting), retry_after=1) if waiting else None


def test_what_is_cancelled_takes_nobodys_place_before_the_loop_ends_it() -> None:
    queue, first, second = RequestQueue(), future("first"), future("second")
    queue.put(first, full)
    with pytest.raises(OverloadedError):
        queue.put(second, full)
    first.cancel()
    assert queue.waiting == 0
    queue.put(second, full)
    assert queue.waiting == 1
    assert queue.futures() == (first, second), "the first has yet to be ended"


def test_nothing_is_accepted_once_it_closes() -> None:
    queue = RequestQueue()
    queue.refuse(ClosingError("closing"))
    with pytest.raises(ClosingError):
        queue.put(future("late"))


def test_a_word_that_comes_before_the_loop_waits_is_not_lost() -> None:
    queue = RequestQueue()
    queue.wake()
    queue.wait(SECONDS)  # which would last for ever, as nothing waits or is active


class Failing(ClosingRunner):
    """An engine that raises while ``broken``, as a device does that was lost."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.broken = runner, True

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        return self._runner.infer(inputs)

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def engine(tiny: Tiny) -> ServedEngine:
    return load_served_engine(tiny.engine, tiny.base, SETTINGS)


@pytest.fixture
def failing(engine: ServedEngine) -> Iterator[tuple[ImageService, Failing]]:
    runner = Failing(engine.runner)
    with ImageService(replace(engine, runner=runner), SETTINGS, Observer()) as service:
        yield service, runner


def test_an_engine_that_fails_every_call_is_not_alive_until_one_succeeds(
    failing: tuple[ImageService, Failing],
) -> None:
    service, runner = failing
    for seed in range(3):
        assert service.alive, f"after {seed} failures"
        with pytest.raises(RuntimeError, match="illegal memory access"):
            service.submit(request(seed), timeout=SECONDS).result(SECONDS)
    assert not service.alive
    runner.broken = False
    service.submit(request(), timeout=SECONDS).result(SECONDS)
    assert service.alive


class Defective(Observer):
    """Raises where the loop does not expect it."""

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        raise ZeroDivisionError

    def ended(self, future: RequestFuture, ending: Ending, seconds: float) -> None:
        raise ZeroDivisionError


def test_a_defect_of_the_loop_fails_what_is_pending_and_refuses_what_comes(engine: ServedEngine) -> None:
    with ImageService(engine, SETTINGS, Defective()) as service:
        futures = [service.submit(request(seed, steps=20), timeout=SECONDS) for seed in range(2)]
        for one in futures:
            with pytest.raises(StoppedError, match="stopped by a defect"):
                one.result(SECONDS)
        with pytest.raises(StoppedError):
            service.submit(request(), timeout=SECONDS)
        assert not service.alive
        assert service.drain(SECONDS), "nothing is left"
        assert service.active == service.waiting == 0
