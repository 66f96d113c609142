"""Whatever stands in a scheduler's configuration: diffusers' own timesteps, or one line before any work."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import diffusers
import pytest
from diffusers import SchedulerMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, load_scheduler
from s2p_deploy.pipeline import Schedule, timesteps_of
from s2p_deploy.schedulers import scheduler_by_name, scheduler_names
from s2p_deploy.timesteps import timestep_indices, timestep_table_of, with_schedules
from tests.small_pipelines import sibling

PRESERVING = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
FOREIGN: tuple[object, ...] = (None, "magic", -1, math.nan)  # in place of any value
# Values of options whose annotation does not say which there are.
VALUES: dict[str, tuple[object, ...]] = {
    "num_train_timesteps": (1000, 50, 1),
    "beta_start": (0.0001, 0.00085, 0.0),
    "beta_end": (0.012, 0.02, 1.0),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (None, [0.01] * 1000, [0.01] * 3, []),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1, 7, 999),
    "sigma_min": (None, 0.002, 0.03),
    "sigma_max": (None, 14.6, 120.0, True),
    "solver_order": (1, 2, 3, 5),
    "disable_corrector": ([], [0, 1]),
    "lambda_min_clipped": (-5.1, 0.0),
    "original_inference_steps": (50, 4, 1),
    "timestep_scaling": (10.0, 0.0),
    "shift": (1.0, 3.0, 0.0),
    "flow_shift": (1.0, 3.0, 0.0),
    "shift_terminal": (None, 0.02, 1.0),
    "base_shift": (0.5, 1.0),
    "max_shift": (1.15,),
    "dynamic_thresholding_ratio": (0.995, 0.0),
    "sample_max_value": (1.0, 0.0),
    "clip_sample_range": (1.0, 0.0),
}


def values_of(name: str, annotation: object) -> tuple[object, ...]:
    if name in VALUES:
        return VALUES[name]
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool or bool in get_args(annotation):
        return (True, False)
    return ()


def configurations(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Up to five options of a class's own signature; one in a few has a value that none could have."""

    @st.composite
    def configuration(draw: st.DrawFn) -> dict[str, Any]:
        name = draw(st.sampled_from(names))
        known = {
            option: values_of(option, annotation)
            for option, annotation in get_type_hints(getattr(diffusers, name).__init__).items()
        }
        options = draw(st.lists(st.sampled_from([one for one, values in known.items() if values]), max_size=5))
        foreign = draw(st.integers(0, 9)) == 0
        chosen = {one: draw(st.sampled_from(known[one] + (FOREIGN if foreign else ()))) for one in options}
        return {"_class_name": name, "beta_schedule": "scaled_linear"} | chosen

    return configuration()


def put_scheduler(base: BasePipeline, config: dict[str, Any]) -> None:
    (base.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (base.folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def skeleton(name: str, folder: Path) -> BasePipeline:
    """A pipeline on disk without weights, whose scheduler may be replaced."""
    source = sibling(name)
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return dataclasses.replace(source, folder=folder)


@pytest.fixture(scope="module")
def unet_base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return skeleton("sdxl", tmp_path_factory.mktemp("schedulers") / "sdxl")


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return skeleton("sd3", tmp_path_factory.mktemp("schedulers") / "sd3")


def stock_scheduler(base: BasePipeline) -> SchedulerMixin:
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    others = [name for name, entry in index.items() if isinstance(entry, list) and name != "scheduler"]
    pipeline_class = getattr(diffusers, base.pipeline_class)
    return pipeline_class.from_pretrained(base.folder, **dict.fromkeys(others), local_files_only=True).scheduler


def assert_diffusers_timesteps_or_refused(base: BasePipeline, config: dict[str, Any], schedule: Schedule) -> None:
    put_scheduler(base, config)
    try:
        found = timesteps_of(base, schedule)
        own = load_scheduler(base)
        scheduler = own if schedule.scheduler is None else scheduler_by_name(schedule.scheduler, own)
        table = timestep_table_of(scheduler, schedule.steps, fractional=True)
        bound = with_schedules(table, [found])
        rows = timestep_indices(found, bound)
    except InputError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said
        return
    stock = stock_scheduler(base) if schedule.scheduler is None else scheduler
    stock.set_timesteps(schedule.steps)
    assert found.tolist() == stock.timesteps.double().tolist()
    assert bound.timesteps[rows] == pytest.approx(found, abs=1e-3)


NAMES = st.sampled_from((None, *scheduler_names()))
STEPS = st.sampled_from((1, 2, 3, 4, 20, 50, 51))
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@many
@given(config=configurations(PRESERVING), name=NAMES, steps=STEPS)
def test_any_configuration_runs_as_diffusers_or_is_refused(
    unet_base: BasePipeline, config: dict[str, Any], name: str | None, steps: int
) -> None:
    assert_diffusers_timesteps_or_refused(unet_base, config, Schedule(steps, name))


@many
@given(config=configurations(4 * FLOW + PRESERVING), name=NAMES, steps=STEPS)
def test_any_configuration_of_flow_matching_runs_as_diffusers_or_is_refused(
    flow_base: BasePipeline, config: dict[str, Any], name: str | None, steps: int
) -> None:
    assert_diffusers_timesteps_or_refused(flow_base, config, Schedule(steps, name))
