from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, load_pipeline, load_scheduler, resolve_base
from tests.small_pipelines import sibling

FLOW, EULER = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"


def base_with(source: BasePipeline, folder: Path, name: str, **options: object) -> BasePipeline:
    """A pipeline without weights that has another scheduler."""
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name} | options))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    return dataclasses.replace(source, folder=folder)


@pytest.mark.parametrize("name", ["shapes", "sd2", "sdxl", "sd3"])
def test_it_is_that_of_the_whole_pipeline(name: str) -> None:
    base = resolve_base("shapes") if name == "shapes" else sibling(name)
    found, whole = load_scheduler(base), load_pipeline(base).scheduler
    assert type(found) is type(whole)
    assert found.config == whole.config


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_no_weights_are_read_and_the_pipeline_corrects_the_options(tmp_path: Path, name: str) -> None:
    base = base_with(sibling(name), tmp_path / "base", EULER, timestep_spacing="leading", steps_offset=1)
    assert load_scheduler(base).config.timestep_spacing == "leading"
    old = base_with(sibling("sd2"), tmp_path / "old", "DDIMScheduler", clip_sample=True, steps_offset=0)
    config = load_scheduler(old).config
    assert (config.clip_sample, config.steps_offset) == (False, 1)  # as diffusers does with old configurations


def test_nothing_is_said_of_the_networks_that_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = base_with(sibling("sd2"), tmp_path / "base", "DDIMScheduler")
    index = json.loads((base.folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (base.folder / "model_index.json").write_text(json.dumps(index))
    load_scheduler(base)
    assert "safety checker" not in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", EULER, "UniPCMultistepScheduler", "LCMScheduler"])
def test_sd3_takes_flow_matching_alone(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"has {name}, but a StableDiffusion3Pipeline takes flow matching alone"):
        load_scheduler(base_with(sibling("sd3"), tmp_path / "base", name))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_solvers_of_flow_matching_are_taken(tmp_path: Path, family: str, name: str) -> None:
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    assert load_scheduler(base_with(sibling(family), tmp_path / "base", name, **options)).config.flow_shift == 3.0


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("name", [FLOW, "FlowMatchHeunDiscreteScheduler"])
def test_pipelines_of_unets_cannot_run_what_scales_no_noise(tmp_path: Path, family: str, name: str) -> None:
    base = base_with(sibling(family), tmp_path / "base", name)
    with pytest.raises(InputError, match=rf"has {name}, which a StableDiffusion(XL)?Pipeline cannot run"):
        load_scheduler(base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (EULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        (EULER, {"beta_schedule": "magic"}),
        (EULER, {"num_train_timesteps": "many"}),
        ("DDIMScheduler", {"num_train_timesteps": -1}),
        ("PNDMScheduler", {"trained_betas": ["one"]}),
    ],
)
def test_a_configuration_that_diffusers_cannot_load_is_one_line(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="cannot be loaded by diffusers") as refused:
        load_scheduler(base_with(sibling("sdxl"), tmp_path / "base", name, **options))
    assert "\n" not in str(refused.value)


def test_a_class_that_diffusers_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the scheduler is a NoSuchScheduler of diffusers, which the installed libr"):
        load_scheduler(base_with(sibling("sdxl"), tmp_path / "base", "NoSuchScheduler"))
