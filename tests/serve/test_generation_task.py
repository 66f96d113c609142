from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.serve.generation_task import BackgroundTask, EngineCall, GenerationTask, OffloadedModule, pause
from s2p_deploy.serve.request import ImageRequest, RequestFuture


def future(calls: int) -> RequestFuture:
    return RequestFuture("id", ImageRequest("", 2, 1.0, 0), calls, submitted=0.0, deadline=1.0)


def test_a_task_pauses_where_it_needs_a_result_and_resumes_with_it() -> None:
    picture = Image.new("RGB", (1, 1))
    heard: list[object] = []

    def draw() -> Image.Image:
        heard.append(pause(BackgroundTask(lambda: "text")))
        heard.append(pause(EngineCall({"timestep_index": np.zeros(2)})))
        return picture

    own = future(1)
    task = GenerationTask(own, draw)
    task.resume()
    assert isinstance(task.waiting_for, BackgroundTask)
    task.resume(task.waiting_for.run())
    assert isinstance(task.waiting_for, EngineCall)
    assert (own.progress, task.denoised) == ((0, 0), False)
    task.resume("noise")
    assert (task.waiting_for, task.picture) == (None, picture)
    assert (own.progress, task.denoised) == ((1, 1), True)
    assert heard == ["text", "noise"]


def test_a_failure_is_raised_where_the_task_waits_and_its_cleanup_runs() -> None:
    cleaned: list[bool] = []

    def draw() -> Image.Image:
        try:
            pause(EngineCall({}))
        finally:
            cleaned.append(True)
        raise AssertionError("never")

    task = GenerationTask(future(1), draw)
    task.resume()
    with pytest.raises(ZeroDivisionError):
        task.throw(ZeroDivisionError())
    assert cleaned == [True]


def test_pausing_outside_a_task_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="only a generation task can pause"):
        pause(EngineCall({}))


def test_an_offloaded_module_runs_in_the_background_and_is_itself_otherwise() -> None:
    class Network:
        config = "its own"

        def __call__(self, value: int, *, twice: bool) -> int:
            return value * (2 if twice else 1)

        def decode(self, value: int) -> int:
            return -value

    offloaded = OffloadedModule(Network())
    assert offloaded.config == "its own"
    heard: list[int] = []

    def draw() -> Image.Image:
        heard.extend((offloaded(3, twice=True), offloaded.decode(4)))
        return Image.new("RGB", (1, 1))

    task = GenerationTask(future(0), draw)
    task.resume()
    while isinstance(task.waiting_for, BackgroundTask):
        task.resume(task.waiting_for.run())
    assert heard == [6, -4]


@pytest.mark.parametrize(("guidance", "embedded", "samples"), [(1.0, False, 1), (2.0, False, 2), (2.0, True, 1)])
def test_guidance_that_the_network_reads_takes_no_second_latent(guidance: float, embedded: bool, samples: int) -> None:
    assert ImageRequest("", 4, guidance, 0, embedded=embedded).samples == samples
