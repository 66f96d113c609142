"""The stages on a device that is not the CPU: nothing mixes devices, nothing computes on the host, nothing waits.

In a process of its own, because a device is registered once and for all: ``tests/test_placement.py`` runs it on the
pretended device, and on a GPU (without the ledger, so only that devices are not mixed) it is::

    PLACEMENT_DEVICE=cuda:0 python -m pytest -p no:randomly -p no:xdist tests/placement/checks.py
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.worker import EngineWorkload
from s2p_deploy.calib import calibrate, dataset_name, fake_quant_denoiser
from s2p_deploy.context import Context
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.metric_networks import CLIP, INCEPTION, LPIPS
from s2p_deploy.pipeline import Schedule, generate
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Skipped
from s2p_deploy.validation import compare, open_chain, open_weights
from s2p_deploy.validation.bisect import bisect
from s2p_deploy.validation.checkpoint import ValidationCheckpoint
from s2p_deploy.validation.perceptual import measure_perceptual
from s2p_deploy.validation.pictures import PicturePairs
from s2p_deploy.validation.reference import choose_latents, stored_predictions, unquantized_denoiser
from s2p_deploy.validation.validate import ValidationRequest, ValidationRun
from tests.placement.pretended_device import LEDGER, HostWork
from tests.placement.stand_in import (
    DEVICE,
    PROMPT,
    REAL,
    device_engine,
    difference_of_shared_batches,
    pipe_of,
    with_component_engines,
)
from tests.validation.networks import write_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.records import CalibratedModel
    from s2p_deploy.validation import Chain
    from tests.placement.pretended_device import Ledger

    Check = Callable[[str, Ledger], None]

ITERATIONS, STOPPED = 3, 2
SMALL: dict[str, dict[str, object]] = {
    "dataset": {"prompts": 2, "samples_per_prompt": 2, "width": 2},
    "sampling": {"steps": 3},
    "scales": {"weights": "max", "latents": 2},
    "training": {"iterations": ITERATIONS, "batch": 2},
    "validation": {"pictures": 2, "latents": 4},
}
OPTIONS_TO_RUN = os.environ.get("PLACEMENT_OPTIONS", "").split(",")
RECIPES = os.environ.get("PLACEMENT_RECIPES", "w8a8").split(",")


class Placed(Context):
    """A context on the device under test."""

    @property
    def torch_device(self) -> torch.device:
        return DEVICE


def enter_stage(stage: str, done: int, total: int) -> None:
    """Names the ledger's stage by the progress of a run: what a stage prepares is booked on the one before."""
    del done, total
    LEDGER.stage = stage


CONTEXT = Placed(device=str(DEVICE), progress=enter_stage, samples_per_call=3)


def begin(stage: str) -> None:
    LEDGER.clear()
    LEDGER.stage = stage


def recipe_of(name: str, training: dict[str, object] | None = None) -> Recipe:
    return Recipe.load(name, SMALL | {"training": SMALL["training"] | (training or {})})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison: calibrations share the dataset in it, so that prompts are walked once."""
    return tmp_path_factory.mktemp("compared")


def calibrated(recipe: Recipe, out: Path, datasets: Path, context: Context = CONTEXT) -> CalibratedModel:
    begin("load")
    dataset = datasets / dataset_name(recipe)
    with HostWork():
        return calibrate(
            resolve_base("shapes"), recipe, as_prompts("shapes:train"), out, dataset=dataset, context=context
        )


@pytest.fixture(scope="module")
def calibration(folder: Path) -> tuple[CalibratedModel, Ledger]:
    """W4A8, and what its making did where."""
    return calibrated(recipe_of("w4a8"), folder / "w4a8" / "calib", folder / "datasets"), copy.deepcopy(LEDGER)


@pytest.fixture(scope="module")
def chain(calibration: tuple[CalibratedModel, Ledger], folder: Path) -> Chain:
    """An engine of the model, for the host: what is compared with the stand-in on the device has one behind it."""
    pytest.importorskip("onnxruntime")
    graph = export_graph(calibration[0], folder / "graph")
    return open_chain(build_engine(graph, folder / "engine", backend="onnxruntime"))


@pytest.fixture(scope="module")
def check(request: pytest.FixtureRequest) -> Iterator[Check]:
    """Checks that nothing was computed on the host; all ledgers are printed at the end."""
    tables: list[str] = []

    def checked(title: str, ledger: Ledger) -> None:
        if REAL:
            return  # it keeps no ledger
        tables.append(ledger.table(title))
        stages = {stage for stage, _, _ in ledger.flops}
        assert stages
        assert {stage: ledger.host_share(stage) for stage in stages} == dict.fromkeys(stages, 0.0)
        downloads = [place for _, what, _, place in ledger.crossings if what == "d2h"]
        assert [place for place in downloads if "pipeline/components.py" in place] == [], "of tensors for a denoiser"

    yield checked
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        request.config.get_terminal_writer().line("\n" + "\n".join(tables))


def test_a_calibration_computes_on_the_device_alone(calibration: tuple[CalibratedModel, Ledger], check: Check) -> None:
    check("calibrate w4a8", calibration[1])


@pytest.mark.parametrize("name", RECIPES)
def test_every_other_recipe_computes_on_the_device_alone(name: str, folder: Path, check: Check) -> None:
    calibrated(recipe_of(name), folder / name / "calib", folder / "datasets")
    check(f"calibrate {name}", LEDGER)


OPTIONS: dict[str, dict[str, object]] = {
    "adapters": {"adapter_rank": 2},
    "features": {"features": {"targets": "blocks"}, "accumulate": 2},
    "freezing": {"freezing": {"what": "oscillation", "every": 1}, "ema": 0.9},
    "checkpointing": {"checkpointing": True, "selection": {"prompts": 1, "every": 2}},
}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in OPTIONS_TO_RUN])
def test_every_option_of_the_training_computes_on_the_device_alone(name: str, folder: Path, check: Check) -> None:
    calibrated(recipe_of("w4a8", OPTIONS[name]), folder / name / "calib", folder / "datasets")
    check(f"calibrate w4a8, {name}", LEDGER)


def test_a_training_waits_for_its_losses_alone(calibration: tuple[CalibratedModel, Ledger]) -> None:
    if REAL:
        pytest.skip("a real device keeps no ledger")
    ledger = calibration[1]
    waits = {place: count for place, count in ledger.waits("training").items() if "files.py" not in place}
    # what files.py writes of the one checkpoint is left out; before it is written, the losses are read once
    assert sum(waits.values()) <= 1, waits
    assert [key for key in ledger.crossings if key[:2] == ("training", "h2d")] == []


def test_a_run_that_was_stopped_ends_in_the_same_bits(
    calibration: tuple[CalibratedModel, Ledger], folder: Path, tmp_path: Path
) -> None:
    recipe, out, datasets = recipe_of("w4a8"), tmp_path / "stopped", folder / "datasets"

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", STOPPED):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(recipe, out, datasets, replace(CONTEXT, progress=stop))
    assert calibrated(recipe, out, datasets).manifest.files == calibration[0].manifest.files


@pytest.fixture(scope="module")
def pipe(calibration: tuple[CalibratedModel, Ledger]) -> DiffusionPipeline:
    return pipe_of(calibration[0])


# Waits in a step: UniPC solves a system of two equations and asks whether it could.
@pytest.mark.parametrize(("scheduler", "waits"), [("ddim", 0), ("pndm", 0), ("euler", 0), ("dpm++2m", 0), ("unipc", 1)])
def test_a_picture_is_drawn_on_the_device_without_a_wait(
    pipe: DiffusionPipeline, scheduler: str, waits: int, check: Check
) -> None:
    counted = []
    for steps in (2, 4):
        begin("generate")
        with HostWork():
            generate(pipe, PROMPT, schedule=Schedule(steps, scheduler), guidance_scale=3.0)
        counted.append(sum(LEDGER.waits("generate").values()))
    check(f"generate, {scheduler}", LEDGER)
    assert REAL or (counted[1] - counted[0]) / 2 <= waits, LEDGER.waits("generate")


def test_a_pipeline_of_engines_alone_draws_without_the_host(pipe: DiffusionPipeline, check: Check) -> None:
    """Text encoder and autoencoder are engines too: tokens and noise go in, a picture comes out."""
    whole, pictures = with_component_engines(pipe), []
    for one in (pipe, whole):
        begin("generate")
        with HostWork():
            pictures.append(generate(one, PROMPT, schedule=Schedule(3, "ddim"), guidance_scale=3.0))
    check("generate, all networks on engines", LEDGER)
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)).max() <= 1
    crossed = Counter(how for _, how, *_ in LEDGER.crossings.elements())
    # tokens of both texts and the noise go in; the picture comes out; steps send the timestep index, and do not wait
    assert REAL or crossed == {"h2d": 3, "h2d async": 3, "d2h": 1}


def test_requests_share_batches_on_the_device(pipe: DiffusionPipeline, check: Check) -> None:
    steps = (3, 4)
    begin("serve")
    assert difference_of_shared_batches(pipe, steps) <= 1
    waits = {place: count for place, count in LEDGER.waits("serve").items() if "s2p_deploy/serve" in place}
    assert REAL or sum(waits.values()) <= len(steps), "one look at a picture's last latents"
    check("serve", LEDGER)


def test_a_validation_computes_on_the_device_alone(chain: Chain, tmp_path: Path, check: Check) -> None:
    """All references and comparisons; parts of the graph and the engine run in ONNX Runtime, on the host."""
    request = ValidationRequest(as_prompts("shapes:held_out").first(2), schedules=(Schedule(2, "ddim"),))
    checkpoint, pipe = ValidationCheckpoint.begin(tmp_path), load_pipeline(chain.base)
    begin("pictures, FP")
    with HostWork(), CONTEXT.arithmetic(), device_engine(chain.calibrated) as runner:
        found, _pairs = ValidationRun(chain, request, checkpoint, pipe, DEVICE, enter_stage).measure(runner)
    assert not isinstance(found.end_to_end, Skipped)
    assert found.end_to_end.engine_to_fake_quant.min() > 100, "the stand-in is the fake-quantized model"
    check("validate", LEDGER)


def test_a_bisection_computes_on_the_device_alone(chain: Chain, check: Check) -> None:
    assert chain.dataset is not None
    models = (make(chain.calibrated).to(DEVICE) for make in (fake_quant_denoiser, unquantized_denoiser))
    begin("bisect")
    with HostWork():
        bisect(*models, choose_latents(chain.dataset, 2), stored_predictions(chain.dataset, 2), groups=1, top=0)
    check("validate --bisect", LEDGER)


def test_metrics_that_need_trained_networks_compute_on_the_device_alone(tmp_path: Path, check: Check) -> None:
    weights = open_weights(write_weights(tmp_path / "weights", INCEPTION, LPIPS, CLIP))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 2, 40, 40, 3), np.uint8)
    begin("perceptual")
    with HostWork():
        found = measure_perceptual(PicturePairs(("a", "b"), *pictures), weights, device=DEVICE)
    assert not any(isinstance(value, Skipped) for value in vars(found).values())
    check("validate --weights-dir", LEDGER)


def test_a_comparison_of_recipes_computes_on_the_device_alone(
    calibration: tuple[CalibratedModel, Ledger], folder: Path, check: Check
) -> None:
    del calibration  # it is used again
    begin("pictures, FP")
    drawn, train = as_prompts("shapes:held_out").first(2), as_prompts("shapes:train")
    with HostWork():
        compare(resolve_base("shapes"), [recipe_of("w4a8")], train, drawn, folder, context=CONTEXT)
    check("compare", LEDGER)


def test_a_benchmark_computes_on_the_device_alone(chain: Chain, check: Check) -> None:
    base = chain.base
    generation = {
        "folder": str(base.folder),
        "source": base.base.source,
        "digest": base.base.digest,
        "guidance_scale": 3.0,
        "pipeline_class": base.pipeline_class,
        "max_sequence_length": 256,
        "strength": 1.0,
        "steps": 2,
    }
    begin("load")
    with HostWork(), device_engine(chain.calibrated) as runner:
        workload = EngineWorkload(chain.engine, runner, 2, generation, CONTEXT)
        workload.step(0)
        begin("a step")
        workload.step(1)
        uploads = [key for key in LEDGER.crossings if key[1] == "h2d"]
        LEDGER.stage = "pictures"
        workload.open_pipeline()
        workload.draw(0)
    check("bench", LEDGER)
    assert uploads == [], "the prompt is there already"
    assert sum(LEDGER.waits("a step").values()) == int(not REAL), "for the end of the step"
