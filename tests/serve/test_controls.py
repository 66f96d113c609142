"""Control pictures per request: in one batch every request has its own, over HTTP too."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy import api
from s2p_deploy.calib.controlnet import calibrate_controlnet
from s2p_deploy.engines import BuildOptions
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Control, Schedule, StartPicture, generate, open_controlnet, open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, Engine, Prompt, PromptSet, ShapeProfile
from s2p_deploy.serve.batching import run_calls
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.request import ImageRequest, RequestedControl
from s2p_deploy.serve.service import ImageService, ServiceSettings, open_service
from tests.serve.http.live_server import IMAGES, PROMPT, Answer, LiveServer, live_server
from tests.serve.test_service import Log
from tests.small_controlnets import control_picture, small_controlnet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.serve.batching import Output
    from s2p_deploy.serve.generation_task import EngineCall
    from tests.serve.conftest import Tiny
    from tests.shared_folder import SharedFolder

    Pixels = NDArray[np.int16]

pytestmark = pytest.mark.slow
MINUTE, STEPS = 60.0, 24  # so many that all four are under way at once, on a busy machine too


@pytest.fixture(scope="module")
def engine(tiny: Tiny, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        model = CalibratedModel.open(tiny.engine.folder.parent / "calib")
        graph = api.export_graph(model, out=folder / "graph", controlnet=True)
        api.build_engine(graph, backend="onnxruntime", out=folder / "engine")

    return Engine.open(shared.made("controlled-engine", make) / "engine")


@pytest.fixture(scope="module")
def folders(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unet, folder = load_pipeline(tiny.base).unet, tmp_path_factory.mktemp("controlnets")
    for seed, name in enumerate(("edges", "depth")):
        small_controlnet(unet, seed).save_pretrained(folder / name)
    return {name: folder / name for name in ("edges", "depth")}


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same on engines, of quantized ones, whose batches are as large as two guided pictures, and as one."""
    folder = tmp_path_factory.mktemp("quantized-controlnets")
    recipe = Recipe.load("w8a8", {"sampling": {"steps": 20}, "dataset": {"prompts": 2, "samples_per_prompt": 10}})
    prompts, pictures = PromptSet((Prompt("a", PROMPT), Prompt("b", PROMPT))), [control_picture(0), control_picture(1)]
    engines = {}
    for most, (name, own) in zip((4, 2), folders.items(), strict=True):
        model = calibrate_controlnet(tiny.base, own, recipe, prompts, pictures, folder / f"{name}-calib")
        graph = api.export_graph(model, out=folder / f"{name}-graph")
        options = BuildOptions(profile=ShapeProfile(1, 2, most))
        engines[name] = api.build_engine(graph, backend="onnxruntime", out=folder / name, options=options).folder
    return engines


def test_four_requests_of_one_batch_have_four_controls(engine: Engine, tiny: Tiny, folders: dict[str, Path]) -> None:
    """Those of a network in floating point depend on the size of its batch by rounding."""
    served, alone, sizes = drawn_together_and_alone(engine, tiny, folders)
    assert {3, 4} <= sizes
    for one, other in zip(served, alone, strict=True):
        assert np.abs(one - other).max() <= 1
    assert not np.array_equal(served[0], served[1])


def test_those_of_engines_are_the_same_to_the_bit(engine: Engine, tiny: Tiny, quantized: dict[str, Path]) -> None:
    served, alone, sizes = drawn_together_and_alone(engine, tiny, quantized)
    assert 4 in sizes
    assert 3 not in sizes, "the second engine takes 2"
    np.testing.assert_array_equal(served, alone)
    assert not np.array_equal(served[0], served[1])


def drawn_together_and_alone(engine: Engine, tiny: Tiny, folders: dict[str, Path]) -> tuple[Pixels, Pixels, set[int]]:
    """Draws four requests, of two ControlNets, in a service, and each with a stock pipeline of its own.

    The sizes are those of the ControlNets' batches.
    """
    log, sizes = Log(), set()
    start = StartPicture(control_picture(5), 0.8)
    edges, depth = (RequestedControl(name, control_picture(seed)) for seed, name in enumerate(folders))
    partly = RequestedControl("edges", control_picture(3), 0.5, 0.2, 0.7)
    requests = [
        ImageRequest("a large red circle", STEPS, 2.0, 1),
        ImageRequest("a large red circle", STEPS, 2.0, 1, controls=(edges,)),
        ImageRequest("a small blue square", STEPS, 2.0, 2, controls=(partly, depth)),
        ImageRequest("a green triangle", STEPS + 1, 1.0, 3, controls=(depth,), start=start),
    ]
    settings = ServiceSettings(batches=(8,), controlnets=tuple(folders.items()))

    def counting(runner: Runner, calls: list[EngineCall], batch: int) -> list[Output]:
        sizes.update([batch] if calls[0].controlnet else [])
        return run_calls(runner, calls, batch)

    with pytest.MonkeyPatch.context() as patched, open_service(engine, tiny.base, settings, log) as service:
        patched.setattr("s2p_deploy.serve.generation_loop.run_calls", counting)
        assert service.info.controlnets == ("edges", "depth")
        with pytest.raises(InputError, match="there is no ControlNet 'lines': use edges, depth"):
            service.submit(
                ImageRequest("x", STEPS, 2.0, 1, controls=(RequestedControl("lines", edges.picture),)), timeout=MINUTE
            )
        log.wait_once = 2.0
        futures = [service.submit(request, timeout=MINUTE) for request in requests]
        served = [np.asarray(future.result(), np.int16) for future in futures]
    assert max(pictures for _, _, pictures in log.batches) == 4, "requests met"
    alone = []
    with open_pipeline(engine, tiny.base) as opened:
        networks = {name: open_controlnet(folder, engine.denoiser_config, 8) for name, folder in folders.items()}
        for request in requests:
            picture = generate(
                opened.pipe,
                Prompt("alone", request.prompt),
                schedule=Schedule(request.steps),
                guidance_scale=request.guidance_scale,
                seed=request.seed,
                start=request.start,
                controls=[Control(networks[c.name], c.picture, c.scale, c.start, c.end) for c in request.controls],
            )
            alone.append(np.asarray(picture, np.int16))
    return np.stack(served), np.stack(alone), sizes


def test_an_engine_without_inputs_for_them_is_refused(tiny: Tiny, folders: dict[str, Path]) -> None:
    settings = ServiceSettings(batches=(2,), controlnets=tuple(folders.items()))
    with pytest.raises(InputError, match="takes no ControlNet: export with --controlnet"):
        open_service(tiny.engine, tiny.base, settings, Observer())


@pytest.fixture(scope="module")
def server(engine: Engine, tiny: Tiny, folders: dict[str, Path]) -> Iterator[LiveServer]:
    metrics = Metrics()
    settings = ServiceSettings(batches=(1, 2), controlnets=tuple(folders.items()))

    def opening() -> ImageService:
        service = open_service(engine, tiny.base, settings, metrics.observer("small"), "small")
        metrics.watch("small", service)
        return service

    with live_server({"small": opening}, metrics=metrics) as live:
        yield live


def encoded(size: int = 64, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    control_picture(size=size).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def picture_of(answer: Answer) -> bytes:
    assert answer.status == 200, answer.body
    return base64.b64decode(answer.data["data"][0]["b64_json"])


def test_a_client_sends_pictures_in_its_request(server: LiveServer) -> None:
    edges = {"name": "edges", "image": encoded()}
    asked = [[], [edges], [edges | {"scale": 0.5}], [edges, edges | {"name": "depth", "start": 0.2, "end": 0.9}]]
    drawn = [picture_of(server.draw(controlnet=controls)) for controls in asked]
    assert len(set(drawn)) == 4
    assert picture_of(server.draw(controlnet=[edges | {"scale": 0.0}])) == drawn[0] == picture_of(server.draw())
    (about,) = server.get("/v1/models").data["data"]
    assert about["controlnets"] == ["edges", "depth"]


def test_an_edit_may_have_them_too(server: LiveServer) -> None:
    picture, boundary = io.BytesIO(), "of-parts"
    control_picture(4).save(picture, "PNG")

    def ask(controls: str) -> Answer:
        fields = {"prompt": PROMPT, "num_inference_steps": "4", "seed": "7", "controlnet": controls}
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        )
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="p.png"\r\n\r\n'.encode()
        body += head + picture.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return server.ask("POST", "/v1/images/edits", body, content_type=kind)

    control = json.dumps([{"name": "edges", "image": encoded(), "scale": 0.7}])
    assert picture_of(ask(control)) != picture_of(ask("[]"))
    bad = ask("[")
    assert (bad.status, bad.data["error"]["param"]) == (400, "controlnet")


@pytest.mark.parametrize(
    ("controls", "param", "said"),
    [
        ([{"name": "lines", "image": "AAAA"}], "controlnet.0.name", "there is no ControlNet 'lines': use edges, depth"),
        ([{"name": "edges"}], "controlnet.0.image", "controlnet.0.image is missing"),
        ([{"name": "edges", "image": "*"}], "controlnet.0.image", "is no base64"),
        ([{"name": "edges", "image": "AAAA"}], "controlnet.0.image", "is no PNG, JPEG or WebP file"),
        ([{"name": "edges", "image": "SMALL"}], "controlnet.0.image", "has 32x32 pixels: give one of 64x64"),
        ([{"name": "edges", "image": "GOOD", "scale": 11}], "controlnet.0.scale", "less than or equal to 10"),
        ([{"name": "edges", "image": "GOOD", "end": 0.5, "start": 0.5}], "controlnet.0.end", "an end above the start"),
        ([{"name": "edges", "image": "GOOD", "mode": "guess"}], "controlnet.0.mode", "is not supported: leave it out"),
        ([{"name": "edges", "image": "GOOD"}] * 5, "controlnet", "at most 4 items"),
        ({"name": "edges"}, "controlnet", "should be a valid list"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    server: LiveServer, controls: list[dict[str, object]], param: str, said: str
) -> None:
    named = {"SMALL": encoded(32), "GOOD": encoded()}
    if isinstance(controls, list):
        controls = [
            one | {"image": named.get(str(one["image"]), one["image"])} if "image" in one else one for one in controls
        ]
    found = server.draw(controlnet=controls)
    error = found.data["error"]
    assert (found.status, error["param"]) == (400, param)
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert server.draw().status == 200  # it keeps serving


def test_the_api_is_described(server: LiveServer) -> None:
    described = json.dumps(server.get("/openapi.json").data)
    assert "ControlForm" in described
    for reference in set(described.split('"$ref": "')[1:]):
        assert reference.startswith("#/components/schemas/")
    assert IMAGES in described
