"""The stages on a device that is not the CPU: nothing mixes devices, nothing computes on the host, nothing waits.

In a process of its own, because a device is registered once and for all: ``tests/test_placement.py`` runs it on the
pretended device, and on a GPU (without the ledger, so only that devices are not mixed) it is::

    PLACEMENT_DEVICE=cuda:0 python -m pytest -p no:randomly -p no:xdist tests/placement/checks.py
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.families import resolve_base
from s2p_deploy.pipeline import Schedule, generate
from s2p_deploy.recipe import Recipe
from tests.placement.pretended_device import LEDGER, HostWork
from tests.placement.stand_in import DEVICE, PROMPT, REAL, difference_of_shared_batches, pipe_of

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.records import CalibratedModel
    from tests.placement.pretended_device import Ledger

ITERATIONS, STOPPED = 4, 3
SMALL: dict[str, dict[str, object]] = {
    "dataset": {"prompts": 2, "samples_per_prompt": 4, "width": 2},
    "sampling": {"steps": 3},
    "scales": {"weights": "max", "latents": 2},
    "training": {"iterations": ITERATIONS, "batch": 2},
    "validation": {"pictures": 2},
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


def calibrated(
    name: str, out: Path, progress: object = enter_stage, training: dict[str, object] | None = None
) -> CalibratedModel:
    LEDGER.clear()
    LEDGER.stage = "load"
    recipe = Recipe.load(name, SMALL | {"training": SMALL["training"] | (training or {})})
    with HostWork():
        context = Placed(progress=progress, samples_per_call=3)  # type: ignore[arg-type] # or what stops a run
        return calibrate(resolve_base("shapes"), recipe, as_prompts("shapes:train"), out, context=context)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibratedModel, Ledger]:
    """W4A8, and what its making did where."""
    return calibrated("w4a8", tmp_path_factory.mktemp("model") / "model"), copy.deepcopy(LEDGER)


def assert_nothing_computed_on_the_host(ledger: Ledger) -> None:
    if REAL:
        return  # it keeps no ledger
    stages = {stage for stage, _, _ in ledger.flops}
    assert stages
    assert {stage: ledger.host_share(stage) for stage in stages} == dict.fromkeys(stages, 0.0)


def test_a_calibration_computes_on_the_device_alone(calibration: tuple[CalibratedModel, Ledger]) -> None:
    assert_nothing_computed_on_the_host(calibration[1])


@pytest.mark.parametrize("name", RECIPES)
def test_every_other_recipe_computes_on_the_device_alone(name: str, tmp_path: Path) -> None:
    calibrated(name, tmp_path / "model")
    assert_nothing_computed_on_the_host(LEDGER)


OPTIONS: dict[str, dict[str, object]] = {
    "adapters": {"adapter_rank": 2},
    "features": {"features": {"targets": "blocks"}, "accumulate": 2},
    "freezing": {"freezing": {"what": "oscillation", "every": 1}, "ema": 0.9},
    "checkpointing": {"checkpointing": True, "selection": {"prompts": 1, "every": 2}},
}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in OPTIONS_TO_RUN])
def test_every_option_of_the_training_computes_on_the_device_alone(name: str, tmp_path: Path) -> None:
    calibrated("w4a8", tmp_path / "model", training=OPTIONS[name])
    assert_nothing_computed_on_the_host(LEDGER)


def test_a_training_waits_for_its_losses_alone(calibration: tuple[CalibratedModel, Ledger]) -> None:
    if REAL:
        pytest.skip("a real device keeps no ledger")
    ledger = calibration[1]
    waits = {place: count for place, count in ledger.waits("training").items() if "files.py" not in place}
    # what files.py writes of the one checkpoint is left out; before it is written, the losses are read once
    assert sum(waits.values()) <= 1, waits
    assert [key for key in ledger.crossings if key[:2] == ("training", "h2d")] == []


def test_a_run_that_was_stopped_ends_in_the_same_bits(
    calibration: tuple[CalibratedModel, Ledger], tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", STOPPED):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated("w4a8", tmp_path / "stopped", stop)
    assert calibrated("w4a8", tmp_path / "stopped").manifest.files == calibration[0].manifest.files


@pytest.fixture(scope="module")
def pipe(calibration: tuple[CalibratedModel, Ledger]) -> DiffusionPipeline:
    return pipe_of(calibration[0])


# Waits in a step: UniPC solves a system of two equations and asks whether it could.
@pytest.mark.parametrize(("scheduler", "waits"), [("ddim", 0), ("pndm", 0), ("euler", 0), ("dpm++2m", 0), ("unipc", 1)])
def test_a_picture_is_drawn_on_the_device_without_a_wait(pipe: DiffusionPipeline, scheduler: str, waits: int) -> None:
    counted = []
    for steps in (2, 4):
        LEDGER.clear()
        LEDGER.stage = "generate"
        with HostWork():
            generate(pipe, PROMPT, schedule=Schedule(steps, scheduler), guidance_scale=3.0)
        counted.append(sum(LEDGER.waits("generate").values()))
    if REAL:
        return
    assert LEDGER.host_share("generate") == 0
    assert (counted[1] - counted[0]) / 2 <= waits, LEDGER.waits("generate")


def test_requests_share_batches_on_the_device(pipe: DiffusionPipeline) -> None:
    steps = (3, 4)
    LEDGER.clear()
    LEDGER.stage = "serve"
    assert difference_of_shared_batches(pipe, steps) <= 1
    waits = {place: count for place, count in LEDGER.waits("serve").items() if "s2p_deploy/serve" in place}
    assert REAL or sum(waits.values()) <= len(steps), "one look at a picture's last latents"
