"""Joined engines in a service and in pipelines: every request's last steps are the other engine's, its LoRAs too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.engines.joined import join_engines
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.pipeline import (
    Schedule,
    generate,
    load_engine_pipeline,
    open_pipeline,
    save_engine_pipeline,
)
from s2p_deploy.pipeline.components import EngineDenoiser
from s2p_deploy.pipeline.lora_files import loras_acting
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, Engine, Prompt
from s2p_deploy.serve.request import ImageRequest, LoraWeight
from s2p_deploy.serve.service import ServiceSettings, open_service
from tests.serve.test_service import Log

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.pipeline import EnginePipeline
    from tests.serve.conftest import Tiny
    from tests.shared_folder import SharedFolder

pytestmark = pytest.mark.slow
MINUTE, RATIO = 60.0, 0.3
PLAIN = ImageRequest("a large red circle", 20, 2.0, seed=1)
REQUESTS = [  # at other steps at the same time
    PLAIN,
    replace(PLAIN, lora=(LoraWeight("ink", 9.0),)),
    replace(PLAIN, steps=8, lora=(LoraWeight("wash", 8.0),)),
    replace(PLAIN, steps=31, seed=4),
]


@pytest.fixture(scope="module")
def floating(tiny: Tiny, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        recipe = Recipe.load("fp", {"sampling": {"steps": 20, "guidance_scale": 2.0}})
        calibrate(tiny.base, recipe, None, folder / "calib")
        graph = export_graph(CalibratedModel.open(folder / "calib"), folder / "graph", lora=LoraRequest(8))
        build_engine(graph, folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("floating-branched-engine", make) / "engine")


@pytest.fixture(scope="module")
def joined(branched_tiny: Tiny, floating: Engine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("joined") / "engine"
    return join_engines(branched_tiny.engine, floating, out, boundary_ratio=RATIO)


def test_requests_in_batches_are_their_lone_runs(
    joined: Engine, branched_tiny: Tiny, lora_files: dict[str, Path]
) -> None:
    log = Log()
    settings = ServiceSettings(batches=(8,), loras=tuple(lora_files.items()))
    with open_service(joined, branched_tiny.base, settings, log) as service:
        log.wait_once = 2.0
        futures = [service.submit(request, timeout=MINUTE) for request in REQUESTS]
        together = [np.asarray(future.result(), np.int16) for future in futures]
        assert max(pictures for _, _, pictures in log.batches) >= 3, "requests met"
        alone = [np.asarray(service.submit(one, timeout=MINUTE).result(), np.int16) for one in REQUESTS]
    np.testing.assert_array_equal(together, alone)
    apart = np.abs(together[0] - together[1]).mean()
    assert apart > 0.3, "LoRAs act"


def test_loras_act_in_both_engines_alike(
    joined: Engine, floating: Engine, branched_tiny: Tiny, lora_files: dict[str, Path]
) -> None:
    """Bit for bit as each has them alone, and gone with them."""
    given = (GivenLora(lora_files["wash"], 8.0),)
    outputs = {}
    for name, engine in {"joined": joined, "high": branched_tiny.engine, "low": floating}.items():
        with open_pipeline(engine, branched_tiny.base) as opened:
            without = predicted(opened, 101)
            with loras_acting(opened.pipe, branched_tiny.base, given):
                outputs[name] = {timestep: predicted(opened, timestep) for timestep in (101, 601)}
            np.testing.assert_array_equal(predicted(opened, 101), without)
            assert not np.array_equal(outputs[name][101], without)
    np.testing.assert_array_equal(outputs["joined"][601], outputs["high"][601])
    np.testing.assert_array_equal(outputs["joined"][101], outputs["low"][101])
    assert not np.array_equal(outputs["high"][101], outputs["low"][101])


def predicted(opened: EnginePipeline, timestep: int) -> NDArray[np.float32]:
    """Calls a pipeline's denoiser with random latents and text, the same at every call of a timestep."""
    generator = torch.Generator().manual_seed(timestep)
    shapes = {spec.name: spec.shape for spec in opened.runner.inputs}
    sample, text = (
        torch.randn((2, *shapes[name][1:]), generator=generator) for name in ("sample", "encoder_hidden_states")
    )
    predicted: NDArray[np.float32] = denoiser_of(opened.pipe)(sample, timestep, text)[0].numpy()
    return predicted


def test_pictures_come_closer_to_those_of_floating_point(joined: Engine, branched_tiny: Tiny, tmp_path: Path) -> None:
    """From a pipeline that was saved with both engines too."""
    prompt, schedule = Prompt("a", "a large red circle"), Schedule(20)
    draw = {"schedule": schedule, "guidance_scale": 2.0, "seed": 3}
    wanted = np.asarray(generate(load_pipeline(branched_tiny.base), prompt, **draw), np.float64)
    distances = []
    for engine in (branched_tiny.engine, joined):
        with open_pipeline(engine, branched_tiny.base) as opened:
            distances.append(np.square(np.asarray(generate(opened.pipe, prompt, **draw)) - wanted).mean())
            save_engine_pipeline(opened.pipe, tmp_path / "saved", replace=True)
    with load_engine_pipeline(tmp_path / "saved") as opened:
        distances.append(np.square(np.asarray(generate(opened.pipe, prompt, **draw)) - wanted).mean())
    assert distances[2] == distances[1] < distances[0]


def test_what_was_saved_with_the_engine_inside_is_looked_at(joined: Engine, tmp_path: Path) -> None:
    denoiser = EngineDenoiser.load(joined.folder)
    for _ in range(2):  # the second time it is there
        denoiser.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "low_noise" / "timesteps.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"timesteps\.json was changed"):
        denoiser.save_pretrained(tmp_path / "unet")
    denoiser.close()


def test_an_engine_of_other_branches_is_refused(branched_tiny: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has other (branches for LoRAs|inputs for .*) than"):
        join_engines(branched_tiny.engine, tiny.engine, tmp_path / "joined", boundary_ratio=RATIO)
