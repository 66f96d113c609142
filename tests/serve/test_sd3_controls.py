"""ControlNets of SD 3 in a service, in floating point and quantized: requests with and without one share batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy import api
from s2p_deploy.calib import calibrate
from s2p_deploy.calib.controlnet import calibrate_controlnet
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Control, Schedule, generate, open_controlnet, open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt, PromptSet
from s2p_deploy.serve.request import ImageRequest, RequestedControl
from s2p_deploy.serve.service import ServiceSettings, open_service
from tests.serve.test_service import Log
from tests.small_controlnets import control_picture, small_controlnet
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
MINUTE, STEPS, TOKENS = 60.0, 6, 8
PROMPTS = PromptSet((Prompt("a", "a large red circle, white background"), Prompt("b", "a small blue square")))


def test_each_request_has_its_own(tmp_path: Path) -> None:
    """Within a step of a pixel, as floating point rounds otherwise at another batch size.

    The codes of a quantized denoiser would enlarge that.
    """
    base = sibling("sd3")
    short = {
        "sampling": {"steps": STEPS, "max_sequence_length": TOKENS},
        "dataset": {"prompts": 2, "samples_per_prompt": STEPS},
        "scales": {"latents": 4},
    }
    recipe, pictures = Recipe.load("w8a8", short), [control_picture(0), control_picture(1)]
    model = calibrate(base, Recipe.load("fp", {"sampling": short["sampling"]}), PROMPTS, tmp_path / "calib")
    graph = api.export_graph(model, out=tmp_path / "graph", controlnet=True)
    engine = api.build_engine(graph, backend="onnxruntime", out=tmp_path / "engine")
    pipe, folders = load_pipeline(base), {"float": tmp_path / "float"}
    small_controlnet(pipe.transformer).save_pretrained(folders["float"])
    quantized = calibrate_controlnet(base, folders["float"], recipe, PROMPTS, pictures, tmp_path / "control-calib")
    graph = api.export_graph(quantized, out=tmp_path / "control-graph")
    folders["int8"] = api.build_engine(graph, backend="onnxruntime", out=tmp_path / "int8").folder
    plain = ImageRequest("a large red circle", STEPS, 2.0, 1)
    requests = [
        plain,
        *(replace(plain, controls=(RequestedControl(name, control_picture(2), 0.9),)) for name in folders),
        replace(plain, seed=3, controls=(RequestedControl("int8", control_picture(3), 0.6, 0.0, 0.5),)),
    ]
    log = Log()
    settings = ServiceSettings(batches=(8,), controlnets=tuple(folders.items()))
    with open_service(engine, base, settings, log) as service:
        log.wait_once = 2.0
        futures = [service.submit(request, timeout=MINUTE) for request in requests]
        served = [np.asarray(future.result(), np.int16) for future in futures]
    assert max(pictures for _, _, pictures in log.batches) >= 3, "requests met"
    alone = lone_runs(engine, folders, requests)
    for request, one, other in zip(requests, served, alone, strict=True):
        assert np.abs(one - other).max() <= 1, request.controls
    for one, other in combinations(served[:3], 2):
        assert np.abs(one - other).max() > 1, "each has its own control"


def lone_runs(engine: Engine, folders: dict[str, Path], requests: list[ImageRequest]) -> list[np.ndarray]:
    with open_pipeline(engine) as opened:
        factor = opened.pipe.vae_scale_factor
        networks = {name: open_controlnet(folder, engine.denoiser_config, factor) for name, folder in folders.items()}
        return [
            np.asarray(
                generate(
                    opened.pipe,
                    Prompt("alone", request.prompt),
                    schedule=Schedule(request.steps, max_sequence_length=TOKENS),
                    guidance_scale=request.guidance_scale,
                    seed=request.seed,
                    controls=[Control(networks[c.name], c.picture, c.scale, c.start, c.end) for c in request.controls],
                ),
                np.int16,
            )
            for request in requests
        ]
