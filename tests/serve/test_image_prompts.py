"""Image prompts per request: in one batch every request has its own, over HTTP too."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy import api
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import ImagePrompt, IpAdapter, Schedule, StartPicture, generate, open_pipeline
from s2p_deploy.records import CalibratedModel, Engine, Prompt
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.request import ImageRequest, RequestedImagePrompt
from s2p_deploy.serve.service import ImageService, ServiceSettings, open_service
from tests.random_ip_adapters import write_ip_adapter
from tests.serve.http.live_server import LiveServer, live_server
from tests.serve.test_service import Log
from tests.small_controlnets import control_picture

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serve.conftest import Tiny
    from tests.shared_folder import SharedFolder

pytestmark = pytest.mark.slow
MINUTE, STEPS = 60.0, 24  # so many that all four are under way at once, on a busy machine too


@pytest.fixture(scope="module")
def engine(tiny: Tiny, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        model = CalibratedModel.open(tiny.engine.folder.parent / "calib")
        graph = api.export_graph(model, out=folder / "graph", image_tokens=8, image_adapters=2)
        api.build_engine(graph, backend="onnxruntime", out=folder / "engine")

    return Engine.open(shared.made("prompted-engine", make) / "engine")


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unet, folder = load_pipeline(tiny.base).unet, tmp_path_factory.mktemp("adapters")
    return {kind: write_ip_adapter(folder / kind, unet, kind) for kind in ("plain", "plus")}


def test_four_requests_of_one_batch_have_four_prompts(engine: Engine, tiny: Tiny, files: dict[str, Path]) -> None:
    log = Log()
    start = StartPicture(control_picture(5), 0.8)
    plain, plus = (RequestedImagePrompt(name, control_picture(seed)) for seed, name in enumerate(files))
    weak = RequestedImagePrompt("plain", control_picture(3), 0.3)
    requests = [
        ImageRequest("a large red circle", STEPS, 2.0, 1),
        ImageRequest("a large red circle", STEPS, 2.0, 1, images=(plain,)),
        ImageRequest("a small blue square", STEPS, 2.0, 2, images=(weak, plus)),
        ImageRequest("a green triangle", STEPS + 1, 1.0, 3, images=(plus,), start=start),
    ]
    settings = ServiceSettings(batches=(8,), ip_adapters=tuple(files.items()))
    with open_service(engine, tiny.base, settings, log) as service:
        assert service.info.ip_adapters == ("plain", "plus")
        unknown = RequestedImagePrompt("faces", plain.picture)
        refused = {"no IP-Adapter 'faces': use plain, plus": (unknown,), "3 image prompts at once": (plain,) * 3}
        for words, images in refused.items():
            with pytest.raises(InputError, match=words):
                service.submit(ImageRequest("x", STEPS, 2.0, 1, images=images), timeout=MINUTE)
        log.wait_once = 2.0
        futures = [service.submit(request, timeout=MINUTE) for request in requests]
        found = [np.asarray(future.result()) for future in futures]
    assert max(pictures for _, _, pictures in log.batches) == 4, "requests met"
    with open_pipeline(engine, tiny.base) as opened:
        adapters = {name: IpAdapter.load(file, opened.pipe) for name, file in files.items()}
        for request, served in zip(requests, found, strict=True):
            alone = generate(
                opened.pipe,
                Prompt("alone", request.prompt),
                schedule=Schedule(request.steps),
                guidance_scale=request.guidance_scale,
                seed=request.seed,
                start=request.start,
                images=[ImagePrompt(adapters[one.name], one.picture, one.scale) for one in request.images],
            )
            np.testing.assert_array_equal(served, np.asarray(alone))
    assert not np.array_equal(found[0], found[1])


def test_an_engine_without_inputs_for_them_is_refused(tiny: Tiny, files: dict[str, Path]) -> None:
    settings = ServiceSettings(batches=(2,), ip_adapters=tuple(files.items()))
    with pytest.raises(InputError, match="takes no image prompts: export with --image-tokens"):
        open_service(tiny.engine, tiny.base, settings, Observer())


def test_a_client_sends_pictures_in_its_request(engine: Engine, tiny: Tiny, files: dict[str, Path]) -> None:
    metrics = Metrics()
    settings = ServiceSettings(batches=(1, 2), ip_adapters=tuple(files.items()))

    def opening() -> ImageService:
        service = open_service(engine, tiny.base, settings, metrics.observer("small"), "small")
        metrics.watch("small", service)
        return service

    buffer = io.BytesIO()
    control_picture(size=50).save(buffer, "PNG")
    plain = {"name": "plain", "image": base64.b64encode(buffer.getvalue()).decode()}

    def draw(server: LiveServer, *images: dict[str, object]) -> str:
        answer = server.draw(ip_adapter=list(images))
        assert answer.status == 200, answer.body
        return str(answer.data["data"][0]["b64_json"])

    with live_server({"small": opening}, metrics=metrics) as server:
        asked = [[], [plain], [plain | {"scale": 0.5}], [plain, plain | {"name": "plus"}]]
        drawn = [draw(server, *images) for images in asked]
        assert len(set(drawn)) == 4
        assert draw(server, plain | {"scale": 0.0}) == drawn[0]
        for wrong, field in (
            (plain | {"name": "faces"}, "ip_adapter.0.name"),
            (plain | {"image": "AAAA"}, "ip_adapter.0.image"),
            (plain | {"scale": 11}, "ip_adapter.0.scale"),
        ):
            answer = server.draw(ip_adapter=[wrong])
            assert (answer.status, answer.data["error"]["param"]) == (400, field)
        assert draw(server, plain) == drawn[1]
        (about,) = server.get("/v1/models").data["data"]
        assert about["ip_adapters"] == ["plain", "plus"]
