"""Requests at different steps in one batch, on a real W8A8 engine: each gets the picture that it would get alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from s2p_deploy.context import Context
from s2p_deploy.engines import load_engine
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError, S2PError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import EngineUNet, Schedule, generate, pipeline_with_engine, timesteps_of
from s2p_deploy.records import Prompt
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.request import (
    CancelledRequestError,
    ClosingError,
    DeadlineError,
    ImageRequest,
    OverloadedError,
    StoppedError,
)
from s2p_deploy.serve.service import ImageService, ServiceSettings, load_served_engine, open_service
from tests.open_runners import watch_runners
from tests.small_controlnets import OpenedEngines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.serve.batching import Batching
    from s2p_deploy.serve.generation_loop import Ending
    from s2p_deploy.serve.request import RequestFuture
    from tests.serve.conftest import Tiny

    Alone = Callable[[ImageRequest], NDArray[np.uint8]]

MINUTE = 60.0


class Log(Observer):
    """What a service told; it may keep the engine waiting after one batch, so that requests meet on a busy machine."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.wait_once = 0.0
        self.endings: Counter[Ending] = Counter()

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        assert seconds > 0
        self.batches.append((samples, padded, pictures))
        wait, self.wait_once = self.wait_once, 0.0
        time.sleep(wait)

    def ended(self, future: RequestFuture, ending: Ending, seconds: float) -> None:
        assert seconds >= 0
        self.endings[ending] += 1


def opened(tiny: Tiny, log: Log, settings: ServiceSettings) -> ImageService:
    return open_service(tiny.engine, tiny.base, settings, log)


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def service(tiny: Tiny, log: Log) -> Iterator[ImageService]:
    with opened(tiny, log, ServiceSettings(batches=(2, 4, 8))) as one:
        yield one


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> Iterator[Alone]:
    """The picture that ``s2p-deploy generate`` draws for a request."""
    floating = load_pipeline(tiny.base)
    with load_engine(tiny.engine) as runner:
        pipe = pipeline_with_engine(floating, tiny.engine, runner)

        def draw(request: ImageRequest) -> NDArray[np.uint8]:
            prompt = Prompt("alone", request.prompt, request.negative)
            schedule = Schedule(request.steps, request.scheduler)
            options = {"schedule": schedule, "guidance_scale": request.guidance_scale, "seed": request.seed}
            return np.asarray(generate(pipe, prompt, **options))

        yield draw


REQUESTS = [  # long enough that the texts of several are done while the first is still drawn
    ImageRequest("a large red circle", 20, 2.0, 1),
    ImageRequest("a small blue square", 25, 2.0, 2),
    ImageRequest("a green triangle", 13, 1.0, 3),
    ImageRequest("a green triangle", 18, 2.0, 3, negative="black background"),
    ImageRequest("a large red circle", 20, 2.0, 4, scheduler="ddim"),
    ImageRequest("a large red circle", 10, 2.0, 4, scheduler="heun"),
    ImageRequest("a large red circle", 17, 2.0, 5, scheduler="unipc"),
    ImageRequest("", 24, 3.0, 2**40),
]


def test_every_picture_is_the_one_it_would_be_alone(service: ImageService, log: Log, alone: Alone) -> None:
    log.batches.clear()
    log.wait_once = 2.0
    futures = [service.submit(request, timeout=MINUTE) for request in REQUESTS]
    found = [np.asarray(future.result()) for future in futures]
    assert max(pictures for _, _, pictures in log.batches) > 1, "requests met"  # the largest batch is timed
    for picture, request in zip(found, REQUESTS, strict=True):
        np.testing.assert_array_equal(picture, alone(request), err_msg=str(request))
    assert [future.progress[0] == future.progress[1] > 0 for future in futures] == [True] * len(futures)


def test_batches_have_profiled_sizes(service: ImageService, log: Log) -> None:
    sizes = {size for size, _ in service.info.batches}
    assert {padded for samples, padded, _ in log.batches if samples <= max(sizes)} <= sizes | {1}
    assert all(samples <= padded for samples, padded, _ in log.batches)


@pytest.mark.parametrize("batching", ["request", "one"])
def test_the_other_ways_draw_the_same(tiny: Tiny, alone: Alone, batching: Batching) -> None:
    requests = REQUESTS[:3]
    with opened(tiny, Log(), ServiceSettings(batching=batching, batches=(2, 4))) as service:
        futures = [service.submit(request, timeout=MINUTE) for request in requests]
        for future, request in zip(futures, requests, strict=True):
            np.testing.assert_array_equal(np.asarray(future.result()), alone(request))


def test_a_request_that_is_given_up_leaves_the_others_alone(service: ImageService, log: Log, alone: Alone) -> None:
    log.endings.clear()
    kept, left = (service.submit(ImageRequest("a large red circle", 10, 2.0, seed), timeout=MINUTE) for seed in (1, 2))
    left.cancel()
    with pytest.raises(CancelledRequestError):
        left.result(MINUTE)
    np.testing.assert_array_equal(np.asarray(kept.result()), alone(kept.request))
    assert log.endings == {"drawn": 1, "cancelled": 1}


class Broken(ClosingRunner):
    """The engine, but that it cannot do one row: it raises, or answers with values that are no numbers."""

    def __init__(self, runner: Runner, row: int, *, raises: bool) -> None:
        self._runner, self._row, self._raises = runner, row, raises

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        bad = inputs["timestep_index"] == self._row
        if self._raises and bad.any():
            raise MemoryError("no room")
        outputs: dict[str, NDArray[Any]] = self._runner.infer(inputs)
        outputs["noise_pred"][bad] = np.nan
        return outputs

    def close(self) -> None:
        self._runner.close()


@pytest.mark.parametrize(
    ("raises", "kind", "message"), [(True, MemoryError, "no room"), (False, S2PError, "values that are no numbers")]
)
def test_one_requests_failure_is_not_the_others(
    tiny: Tiny, alone: Alone, raises: bool, kind: type[Exception], message: str
) -> None:
    settings = ServiceSettings(batches=(8,))
    served = load_served_engine(tiny.engine, tiny.base, settings)
    sound, doomed = ImageRequest("a large red circle", 10, 2.0, 1), ImageRequest("a large red circle", 15, 2.0, 1)
    rows = {request: set(timesteps_of(served.pipe, Schedule(request.steps)).astype(int)) for request in (sound, doomed)}
    row = sorted(rows[doomed] - rows[sound])[2]  # late, when all three are under way
    log = Log()
    with ImageService(replace(served, runner=Broken(served.runner, row, raises=raises)), settings, log) as service:
        futures = [service.submit(request, timeout=MINUTE) for request in (sound, doomed, sound)]
        with pytest.raises(kind, match=message):
            futures[1].result(MINUTE)
        for future in (futures[0], futures[2]):
            np.testing.assert_array_equal(np.asarray(future.result(MINUTE)), alone(sound))
    assert log.endings == {"drawn": 2, "failed": 1}
    assert any(pictures == 3 for _, _, pictures in log.batches)


def test_a_late_request_is_told_how_far_it_came(service: ImageService) -> None:
    future = service.submit(ImageRequest("a large red circle", 10, 2.0, 1), timeout=0.0)
    with pytest.raises(DeadlineError, match=r"ran out (before it began|after \d+ of \d+ steps): allow more"):
        future.result(MINUTE)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest("", 10, 2.0, 1, scheduler="nobody"), "unknown scheduler 'nobody'"),
        (ImageRequest("", 10, 2.0, 1, scheduler="euler-karras"), "is fractional: this schedule needs an engine"),
        (ImageRequest("", 10, 2.0, 1, size=(65, 64)), "must be multiples of 8"),
        (ImageRequest("", 10, 2.0, 1, size=(128, 64)), "this engine draws 64x64 pixels"),
    ],
)
def test_what_the_engine_cannot_draw_is_refused_at_once(
    service: ImageService, request_: ImageRequest, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        service.submit(request_, timeout=MINUTE)
    assert service.alive


def test_a_full_queue_says_when_to_come_back(tiny: Tiny) -> None:
    log = Log()
    with opened(tiny, log, ServiceSettings(max_waiting=2, max_active=1, batches=(2,))) as service:
        futures, refused = [], []
        for seed in range(12):
            try:
                futures.append(service.submit(ImageRequest("", 10, 2.0, seed), timeout=MINUTE))
            except OverloadedError as error:
                refused.append(error)
        assert refused
        assert all(1 <= error.retry_after <= 600 for error in refused)
        wait(futures, MINUTE)
        assert log.endings == {"drawn": len(futures) + 1}, "all that were taken, and the warm-up"
        assert service.submit(ImageRequest("", 3, 2.0, 0), timeout=MINUTE).result()


def test_a_drained_service_finishes_what_it_took(tiny: Tiny) -> None:
    service = opened(tiny, Log(), ServiceSettings(batches=(2,)))
    futures = [service.submit(ImageRequest("", 10, 2.0, seed), timeout=MINUTE) for seed in range(3)]
    assert service.drain(MINUTE)
    assert all(future.done() for future in futures)
    with pytest.raises(ClosingError):
        service.submit(ImageRequest("", 10, 2.0, 0), timeout=MINUTE)
    service.close()
    service.close()


def test_a_closed_service_answers_everyone(tiny: Tiny) -> None:
    service = opened(tiny, Log(), ServiceSettings(max_active=1, batches=(2,)))
    futures = [service.submit(ImageRequest("", 10, 2.0, seed), timeout=MINUTE) for seed in range(8)]
    service.close()
    for future in futures:
        error = future.exception(0)
        assert error is None or isinstance(error, ClosingError)
    assert not service.alive
    assert service.active == service.waiting == 0


def test_requests_come_from_many_threads(service: ImageService, alone: Alone) -> None:
    found: dict[int, NDArray[np.uint8]] = {}

    def ask(seed: int) -> None:
        future = service.submit(ImageRequest("a large red circle", 3 + seed % 4, 2.0, seed), timeout=MINUTE)
        found[seed] = np.asarray(future.result())

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MINUTE)
    for seed in (0, 7, 15):
        np.testing.assert_array_equal(found[seed], alone(ImageRequest("a large red circle", 3 + seed % 4, 2.0, seed)))


def test_engines_of_controlnets_have_the_device_and_end_with_the_service(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = OpenedEngines()
    monkeypatch.setattr("s2p_deploy.serve.service.open_controlnet", engines)
    monkeypatch.setattr("s2p_deploy.serve.service.controlnet_memory", lambda *_given: (False, 1))
    monkeypatch.setattr(EngineUNet, "takes_residuals", True)
    settings = ServiceSettings(batches=(2,), controlnets=(("edges", tmp_path), ("depth", tmp_path)))
    engine = load_served_engine(tiny.engine, tiny.base, settings, context=Context(device="cpu"))
    with ImageService(engine, settings, Observer()):
        assert (engines.devices, engines.open) == (["cpu", "cpu"], 2)
    assert engines.open == 0


def test_a_service_whose_second_controlnet_fails_leaves_no_engine_open(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, (opened, still_open) = OpenedEngines(most=1), watch_runners(monkeypatch)
    monkeypatch.setattr("s2p_deploy.serve.service.open_controlnet", engines)
    monkeypatch.setattr("s2p_deploy.serve.service.controlnet_memory", lambda *_given: (False, 1))
    monkeypatch.setattr(EngineUNet, "takes_residuals", True)
    settings = ServiceSettings(batches=(2,), controlnets=(("edges", tmp_path), ("depth", tmp_path)))
    with pytest.raises(IntegrityError, match="another one cannot be opened"):
        open_service(tiny.engine, tiny.base, settings, Observer())
    assert (len(engines.devices), engines.open) == (1, 0)
    assert opened
    assert not still_open


def test_a_service_that_draws_no_first_picture_is_closed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Observer):
        def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
            raise ValueError("cannot count")

    opened, still_open = watch_runners(monkeypatch)
    with pytest.raises(StoppedError):
        open_service(tiny.engine, tiny.base, ServiceSettings(batches=(2,)), Broken())
    assert opened
    assert not still_open


def test_an_unknown_batching_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="unknown batching 'all'"):
        ServiceSettings(batching="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_controlnets_that_memory_does_not_hold_are_refused_before_they_are_opened(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool
) -> None:
    engines = OpenedEngines()
    monkeypatch.setattr("s2p_deploy.serve.service.open_controlnet", engines)
    monkeypatch.setattr("s2p_deploy.serve.service.controlnet_memory", lambda *_given: (on_gpu, 2**20))
    for place, free in (("available_memory", 3 * 2**19), ("free_gpu_memory", 2**20)):
        monkeypatch.setattr(f"s2p_deploy.serve.service.{place}", lambda *_given, free=free: free)
    monkeypatch.setattr(EngineUNet, "takes_residuals", True)
    settings = ServiceSettings(batches=(2,), controlnets=(("edges", tmp_path), ("depth", tmp_path)))
    free = "1.0" if on_gpu else "1.5"
    said = rf"take 2\.0 MiB of memory \(edges 1\.0, depth 1\.0\), {free} are free: serve fewer"
    with pytest.raises(MissingEnvironmentError, match=said):
        load_served_engine(tiny.engine, tiny.base, settings)
    assert not engines.devices
