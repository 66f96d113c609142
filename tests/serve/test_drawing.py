from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.serve.components import AsideNetwork
from s2p_deploy.serve.drawing import Drawing, EngineCall, SideTask, pause
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.ticket import Ticket


def ticket() -> Ticket:
    return Ticket("id", ImageRequest("", 2, 1.0, 0), taken=0.0, deadline=1.0)


def test_a_drawing_stops_where_it_needs_an_answer_and_goes_on_with_it() -> None:
    picture = Image.new("RGB", (1, 1))
    heard: list[object] = []

    def draw() -> Image.Image:
        heard.append(pause(SideTask(lambda: "text")))
        heard.append(pause(EngineCall({"step_index": np.zeros(2)})))
        return picture

    own = ticket()
    drawing = Drawing(own, draw, calls=1, samples=2)
    drawing.go_on()
    assert isinstance(drawing.wants, SideTask)
    drawing.go_on(drawing.wants.run())
    assert isinstance(drawing.wants, EngineCall)
    assert (own.progress, drawing.denoised) == ((0, 0), False)
    drawing.go_on("noise")
    assert (drawing.wants, drawing.picture) == (None, picture)
    assert (own.progress, drawing.denoised) == ((1, 1), True)
    assert heard == ["text", "noise"]


def test_a_failure_is_raised_where_the_drawing_waits_and_its_cleanup_runs() -> None:
    cleaned: list[bool] = []

    def draw() -> Image.Image:
        try:
            pause(EngineCall({}))
        finally:
            cleaned.append(True)
        raise AssertionError("never")

    drawing = Drawing(ticket(), draw, calls=1, samples=1)
    drawing.go_on()
    with pytest.raises(ZeroDivisionError):
        drawing.fail(ZeroDivisionError())
    assert cleaned == [True]


def test_pausing_outside_a_drawing_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="only a drawing can pause"):
        pause(EngineCall({}))


def test_a_network_aside_runs_when_it_is_answered_and_is_itself_otherwise() -> None:
    class Network:
        config = "its own"

        def __call__(self, value: int, *, twice: bool) -> int:
            return value * (2 if twice else 1)

        def decode(self, value: int) -> int:
            return -value

    aside = AsideNetwork(Network())
    assert aside.config == "its own"
    heard: list[int] = []

    def draw() -> Image.Image:
        heard.extend((aside(3, twice=True), aside.decode(4)))
        return Image.new("RGB", (1, 1))

    drawing = Drawing(ticket(), draw, calls=0, samples=1)
    drawing.go_on()
    while isinstance(drawing.wants, SideTask):
        drawing.go_on(drawing.wants.run())
    assert heard == [6, -4]
