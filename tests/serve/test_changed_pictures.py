"""Engines of pipelines that change pictures, served: every request brings its picture, and gets what it would alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2p_deploy import api
from s2p_deploy.errors import InputError
from s2p_deploy.pipeline import Schedule, StartPicture, generate
from s2p_deploy.records import Prompt
from s2p_deploy.serve.generation_loop import Observer
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.service import ServiceSettings, open_service
from tests.small_pipelines import sibling

MINUTE, SIDE = 60.0, 64


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masked"), [("inpaint", True), ("refiner", False)])
def test_requests_with_pictures_are_drawn_as_they_would_be_alone(name: str, masked: bool, tmp_path: Path) -> None:
    base = sibling(name)
    pictures = {} if masked else {"sampling": {"pictures": str(sibling("sdxl").folder)}}
    recipe = {"name": "tiny", "extends": "ptq-stream"} | pictures
    model = api.calibrate(str(base.folder), recipe=recipe, out=tmp_path / "calib")
    graph = api.export_graph(model, out=tmp_path / "graph")
    engine = api.build_engine(graph, backend="onnxruntime", out=tmp_path / "engine")
    mask = Image.new("L", (SIDE, SIDE), "white") if masked else None
    starts = [StartPicture(picture(seed), 0.6 if masked else 0.3, mask) for seed in range(3)]
    requests = [
        ImageRequest("a large red circle", 8, 2.0, seed, size=(SIDE, SIDE), start=start)
        for seed, start in enumerate(starts)
    ]
    with open_service(engine, base, ServiceSettings(batches=(2, 4)), Observer()) as service:
        with pytest.raises(InputError, match="does not draw from text alone"):
            service.submit(ImageRequest("a large red circle", 8, 2.0, 1), timeout=MINUTE)
        futures = [service.submit(request, timeout=MINUTE) for request in requests]
        found = [np.asarray(future.result()) for future in futures]
    with api.open_pipeline(engine, model=base, schedules=[Schedule(8, strength=starts[0].strength)]) as opened:
        for request, served in zip(requests, found, strict=True):
            schedule = Schedule(8, size=(SIDE, SIDE))
            options = {"guidance_scale": 2.0, "seed": request.seed, "start": request.start}
            alone = generate(opened.pipe, Prompt("alone", request.prompt), schedule=schedule, **options)
            np.testing.assert_array_equal(served, np.asarray(alone))
