"""Every scheduler through the rows: each timestep has its row, and the whole loop is that of diffusers' own UNet."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import TimePath, indexed_denoiser, load_pipeline, with_denoiser
from s2p_deploy.pipeline import EngineUNet, Schedule, generate, initial_noise, timesteps_of
from s2p_deploy.records import Prompt, TimestepTable, TimeTable
from s2p_deploy.schedulers import on_host, scheduler_by_name, scheduler_names, skipped_calls, with_steps
from s2p_deploy.timesteps import (
    angles_from_alphas,
    scale_origins,
    timestep_indices,
    timestep_table_of,
    with_schedules,
)
from tests.small_pipelines import sibling, tiny_base, whole_denoiser

PROMPT = "a small red circle at the top left, white background"
TOLERANCE = 1e-4  # of the latents' norm, at the end of the loop: float32 in another order
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ANGLE = angles_from_alphas(torch.cumprod(1 - BETAS, 0).numpy())
TABLE = TimestepTable("PNDMScheduler", {}, 50, tuple(range(1, 982, 20)), ANGLE)  # what 50 PNDM steps calibrate

Make = Callable[[SchedulerMixin], SchedulerMixin]


def of_class(name: str, **options: object) -> Make:
    return lambda own: getattr(diffusers, name).from_config(own.config, **options)


# What the command line has no names for.
OTHERS: dict[str, Make] = {
    "pndm with prk": of_class("PNDMScheduler", skip_prk_steps=False),
    "ddim trailing": of_class("DDIMScheduler", clip_sample=False, timestep_spacing="trailing"),
    "euler ancestral": of_class("EulerAncestralDiscreteScheduler"),
    "lms": of_class("LMSDiscreteScheduler"),
    "euler trailing": of_class("EulerDiscreteScheduler", timestep_spacing="trailing"),
    "kdpm2": of_class("KDPM2DiscreteScheduler"),
    "heun karras": of_class("HeunDiscreteScheduler", use_karras_sigmas=True),
}
PRESERVING = tuple(name for name in scheduler_names() if not name.startswith("flow-"))
NAMED: dict[str, Make] = {name: lambda own, name=name: scheduler_by_name(name, own) for name in PRESERVING}
SCHEDULERS = NAMED | OTHERS
FRACTIONAL = {"euler-linspace", "euler-karras", "kdpm2", "heun karras"}  # linspace by numbers that do not divide 999


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipeline(tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline"))


def timesteps_asked(base: StableDiffusionPipeline, name: str, steps: int) -> np.ndarray:
    scheduler = SCHEDULERS[name](base.scheduler)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.double().numpy()


def row_path(base: StableDiffusionPipeline, table: TimestepTable) -> EngineUNet:
    """The floating-point indexed denoiser on the rows of ``table``, behind the runner's interface."""
    unet = copy.deepcopy(base.unet)
    path = TimePath(unet)
    with torch.no_grad():
        features = path(torch.from_numpy(table.timesteps).float()).numpy()
    float_denoiser = indexed_denoiser(unet, TimeTable(features, path.slices)).eval()
    return EngineUNet(TorchRunner(float_denoiser), base.unet.config, table)


def drawn(pipe: DiffusionPipeline, scheduler: SchedulerMixin, **options: object) -> np.ndarray:
    pipe.scheduler = scheduler  # as users do it
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 1.0, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    if isinstance(pipe, StableDiffusionPipeline):
        arguments["latents"] = initial_noise([7], pipe.unet.config)
    return pipe(PROMPT, **arguments | options).images.numpy()


def assert_same_loop(base: StableDiffusionPipeline, table: TimestepTable, make: Make, **options: object) -> None:
    kind = StableDiffusionImg2ImgPipeline if "image" in options else StableDiffusionPipeline
    shared = {"requires_safety_checker": False, "safety_checker": None, "feature_extractor": None}
    results = []
    for unet in (base.unet, row_path(base, table)):
        pipe = kind(**base.components | {"unet": unet} | shared)
        results.append(drawn(pipe, make(base.scheduler), **options))
    reference, found = results
    assert np.isfinite(reference).all()
    assert np.linalg.norm(found - reference) <= TOLERANCE * np.linalg.norm(reference)


@pytest.mark.parametrize("steps", [4, 10, 20, 25, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_timestep_has_its_row(base: StableDiffusionPipeline, name: str, steps: int) -> None:
    asked = timesteps_asked(base, name, steps)
    bound = with_schedules(TABLE, [asked])
    rows = timestep_indices(asked, bound)
    assert bound.timesteps[rows] == pytest.approx(asked, abs=1e-3)
    distinct = np.unique(asked)
    origins = scale_origins(asked, TABLE)
    assert len(origins.calibrated + origins.interpolated + origins.clamped) == len(distinct)
    if (np.abs(asked - np.rint(asked)) > 1e-3).any():
        assert name in FRACTIONAL
        assert len(bound) > 1000
        with pytest.raises(InputError, match="fractional: this schedule needs an engine exported with --time-table"):
            timestep_indices(asked, TABLE)
    else:
        assert len(bound) == 1000
        assert rows.tolist() == timestep_indices(asked, TABLE).tolist() == np.rint(asked).tolist()


def test_the_table_of_calls_is_the_one_that_is_relied_on(base: StableDiffusionPipeline) -> None:
    """Calls and distinct timesteps of 20 steps: a counter would be wrong for the first of each pair."""
    calls = {name: timesteps_asked(base, name, 20) for name in ("pndm", "pndm with prk", "heun", "kdpm2", "ddim")}
    found = {name: (len(asked), len(np.unique(asked))) for name, asked in calls.items()}
    assert found == {
        "pndm": (21, 20),
        "pndm with prk": (29, 23),
        "heun": (39, 20),
        "kdpm2": (39, 39),
        "ddim": (20, 20),
    }


@pytest.mark.parametrize("form", ["constant", "input"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_whole_loop_is_that_of_the_unet(base: StableDiffusionPipeline, name: str, form: str) -> None:
    steps = 5
    if form == "constant" and name in FRACTIONAL:
        pipe, scheduler = with_denoiser(base, row_path(base, TABLE)), SCHEDULERS[name](base.scheduler)
        with pytest.raises(InputError, match="--time-table input"):  # at the first step
            drawn(pipe, scheduler, num_inference_steps=steps)
        return
    others = timesteps_asked(base, "euler-linspace", 7)  # bound too, never asked for
    table = TABLE if form == "constant" else with_schedules(TABLE, [others, timesteps_asked(base, name, steps)])
    assert_same_loop(base, table, SCHEDULERS[name], num_inference_steps=steps)


@pytest.mark.parametrize("name", ["pndm", "ddim", "heun", "dpm++2m", "euler-karras", "heun karras"])
def test_the_last_part_of_a_schedule_runs_too(base: StableDiffusionPipeline, name: str) -> None:
    steps = 8
    table = with_schedules(TABLE, [timesteps_asked(base, name, steps)])
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert_same_loop(base, table, SCHEDULERS[name], image=image, strength=0.5, num_inference_steps=steps)


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "heun"])
def test_chosen_timesteps_run_too(base: StableDiffusionPipeline, name: str) -> None:
    assert_same_loop(base, TABLE, SCHEDULERS[name], timesteps=[981, 640, 333, 21])


def test_chosen_sigmas_run_once_their_timesteps_are_bound(base: StableDiffusionPipeline) -> None:
    sigmas = [11.0, 4.0, 1.5, 0.4, 0.1]
    scheduler = SCHEDULERS["euler"](base.scheduler)
    scheduler.set_timesteps(sigmas=sigmas)
    table = with_schedules(TABLE, [scheduler.timesteps.numpy()])
    assert len(table) > 1000
    assert_same_loop(base, table, SCHEDULERS["euler"], sigmas=sigmas)


def test_the_first_part_of_a_schedule_has_the_same_rows(base: StableDiffusionPipeline) -> None:
    """What ``denoising_end`` leaves of one."""
    asked = timesteps_asked(base, "euler-karras", 20)
    table = with_schedules(TABLE, [asked])
    assert timestep_indices(asked[:12], table).tolist() == timestep_indices(asked, table)[:12].tolist()


@torch.no_grad()
@pytest.mark.parametrize("timesteps", [[981.0, 1.0, 500.0], [981.0, 700.25, 30.5]])
def test_samples_of_one_batch_are_on_timesteps_of_their_own(
    base: StableDiffusionPipeline, timesteps: list[float]
) -> None:
    table = TABLE if timesteps == np.rint(timesteps).tolist() else with_schedules(TABLE, [timesteps])
    sample, text = initial_noise(range(3), base.unet.config), torch.ones(3, 24, 128)
    expected = base.unet(sample, torch.tensor(timesteps), text).sample
    found = row_path(base, table)(sample, torch.tensor(timesteps), text).sample
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE


def test_a_schedule_that_is_not_bound_is_refused_at_the_first_step(base: StableDiffusionPipeline) -> None:
    denoiser = row_path(base, with_schedules(TABLE, [timesteps_asked(base, "euler-karras", 20)]))
    scheduler = SCHEDULERS["euler-karras"](base.scheduler)
    with pytest.raises(InputError, match="the engine is not bound to this schedule"):
        drawn(with_denoiser(base, denoiser), scheduler, num_inference_steps=11)


@pytest.mark.parametrize("name", PRESERVING)
def test_the_noise_schedule_is_the_pipelines(base: StableDiffusionPipeline, name: str) -> None:
    scheduler = scheduler_by_name(name, base.scheduler)
    assert scheduler.config.beta_end == base.scheduler.config.beta_end
    assert scheduler.config.prediction_type == base.scheduler.config.get("prediction_type", "epsilon")
    assert not scheduler.config.get("clip_sample", False), "latents are no pictures"


def test_a_named_scheduler_does_not_inherit_the_sigmas_of_another(base: StableDiffusionPipeline) -> None:
    karras = scheduler_by_name("dpm++2m-karras", base.scheduler)
    for name in ("dpm++2m", "euler", "euler-linspace", "heun", "unipc"):
        assert scheduler_by_name(name, karras).config.use_karras_sigmas is False


def test_timesteps_of_a_schedule_are_what_the_pipeline_asks_for(base: StableDiffusionPipeline) -> None:
    asked = timesteps_of(base, Schedule(20, "pndm"))
    assert len(asked) == 21
    assert asked.tolist() == timesteps_asked(base, "pndm", 20).tolist()
    with pytest.raises(InputError, match="LCMScheduler, as it is configured, cannot do 60 steps"):
        timesteps_of(base, Schedule(60, "lcm"))


@pytest.mark.parametrize("name", PRESERVING)
def test_timesteps_stay_on_the_host(name: str) -> None:
    original = scheduler_by_name(name, PNDMScheduler())
    kept = on_host(original)
    original.set_timesteps(4)
    kept.set_timesteps(4, device="meta")
    assert torch.equal(kept.timesteps, original.timesteps)
    assert type(kept).__name__ == type(original).__name__
    configs = [{key: value for key, value in one.config.items() if key[0] != "_"} for one in (kept, original)]
    assert configs[0] == configs[1]
    assert inspect.signature(kept.set_timesteps) == inspect.signature(original.set_timesteps)


FLOWS = {"dpm++2m", "dpm++2m-karras", "unipc"}  # solvers that run flow matching where their options say so
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SOLVERS = (EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
SPACED = [(one, option) for one in SOLVERS for option in SPACINGS if option in inspect.signature(one).parameters]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("own", [FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler()])
@pytest.mark.parametrize("name", PRESERVING)
def test_flow_matching_takes_no_scheduler_of_another_kind(own: SchedulerMixin, name: str) -> None:
    with pytest.raises(InputError) as refused:
        scheduler_by_name(name, own)
    assert str(refused.value) == (
        f"scheduler {name!r} is for networks that predict noise, v or x0, this pipeline for flow matching: use"
        f" flow-euler, or name none, for the pipeline's own {type(own).__name__}"
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler, *SOLVERS])
def test_other_networks_take_no_scheduler_of_flow_matching(kind: type, prediction: str) -> None:
    own = kind(**SD, prediction_type=prediction)
    with pytest.raises(
        InputError, match=rf"is for flow matching.*use pndm, ddim, .*the pipeline's own {kind.__name__}"
    ):
        scheduler_by_name("flow-euler", own)
    assert {scheduler_by_name(name, own).config.prediction_type for name in PRESERVING} == {prediction}


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_solvers_of_flow_matching_are_taken_where_the_own_one_is_such(kind: type) -> None:
    own = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for name in PRESERVING:
        if name in FLOWS:
            config = scheduler_by_name(name, own).config
            assert (config.use_flow_sigmas, config.prediction_type, config.flow_shift) == (True, "flow_prediction", 3.0)
        else:
            with pytest.raises(InputError, match="this pipeline for flow matching: use dpm"):
                scheduler_by_name(name, own)


def test_what_is_refused_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing beside it of options that a class does not know."""
    for own in (FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        for name in ("lcm", "ddim", "euler-karras"):
            with pytest.raises(InputError, match=f"scheduler '{name}' is for networks"):
                scheduler_by_name(name, own)
    with pytest.raises(InputError, match="scales no noise, which this pipeline's scheduler does: use dpm"):
        scheduler_by_name("flow-euler", own)
    assert "config attributes" not in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "option"), SPACED)
@pytest.mark.parametrize("name", PRESERVING)
def test_of_spacings_that_exclude_each_other_the_name_decides(name: str, kind: type, option: str) -> None:
    config = scheduler_by_name(name, kind(**SD, **{option: True})).config
    known = inspect.signature(type(scheduler_by_name(name, kind(**SD))).__init__).parameters
    on = [one for one in SPACINGS if one in known and config[one]]
    assert on == (["use_karras_sigmas"] if name.endswith("karras") else [])


@pytest.mark.parametrize(
    "own", [PNDMScheduler(), DDIMScheduler(beta_schedule="squaredcos_cap_v2"), DDIMScheduler(**SD)]
)
@pytest.mark.parametrize("name", PRESERVING)
def test_a_noise_schedule_by_default_is_not_the_default_of_another_class(own: SchedulerMixin, name: str) -> None:
    assert torch.equal(scheduler_by_name(name, own).alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize("name", PRESERVING)
def test_zero_terminal_snr_stays_or_is_refused(name: str) -> None:
    own = DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    if name in {"pndm", "heun"}:
        with pytest.raises(InputError, match=r"noise schedule \(rescale_betas_zero_snr\): use ddim, euler, "):
            scheduler_by_name(name, own)
        return
    made = with_steps(scheduler_by_name(name, own), 20)
    assert torch.allclose(made.alphas_cumprod, own.alphas_cumprod, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (UniPCMultistepScheduler(use_dynamic_shifting=True, use_flow_sigmas=True), "use_dynamic_shifting"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous is not supp"),
        (PNDMScheduler(prediction_type="sample"), "prediction_type given as sample"),
        (HeunDiscreteScheduler(prediction_type="magic"), "prediction_type given as magic"),
        (EulerDiscreteScheduler(prediction_type="flow_prediction"), "prediction_type given as flow_prediction"),
        (DDIMScheduler(timestep_spacing="magic"), "magic is not supported"),
        (DPMSolverMultistepScheduler(final_sigmas_type="magic"), "final_sigmas_type"),
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "no numbers.*zero_snr True"),
        (DPMSolverMultistepScheduler(variance_type="learned_range"), "must match the size"),
        (FlowMatchEulerDiscreteScheduler(shift=float("nan")), "asks for timestep nan"),
    ],
)
@pytest.mark.parametrize("steps", [4, 20])
def test_what_would_fail_on_the_way_is_refused_before(scheduler: SchedulerMixin, said: str, steps: int) -> None:
    with pytest.raises(InputError, match=said) as refused:
        with_steps(scheduler, steps)
    assert type(scheduler).__name__ in str(refused.value)
    assert "\n" not in str(refused.value)


# Options of the pipeline's own scheduler, for networks that predict v: each class with those that it has.
OPTIONS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "karras": {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    "lu": {"use_lu_lambdas": True},
    "log linear": {"interpolation_type": "log_linear", "timestep_spacing": "linspace"},
    "continuous": {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_max": 120.0, "sigma_min": 0.002},
}
CLASSES = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
EVERY = [
    (name, kind)
    for name in CLASSES
    for kind, options in OPTIONS.items()
    if set(options) <= set(inspect.signature(getattr(diffusers, name).__init__).parameters) | {"final_sigmas_type"}
]


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_options_of_the_own_scheduler_draw_as_diffusers_or_are_refused(
    base: StableDiffusionPipeline, name: str, kind: str, steps: int
) -> None:
    own = of_class(name, **OPTIONS[kind], prediction_type="v_prediction", skip_prk_steps=True)
    if kind == "continuous":
        with pytest.raises(InputError, match="timestep_type continuous is not supported"):
            with_steps(own(base.scheduler), steps)
        return
    asked = with_steps(own(base.scheduler), steps).timesteps.double().numpy()
    table = timestep_table_of(own(base.scheduler), steps, fractional=True)
    assert_same_loop(base, with_schedules(table, [asked]), own, num_inference_steps=steps)


def test_flow_euler_is_the_own_scheduler_on_any_number_of_steps() -> None:
    pipe, prompt = load_pipeline(sibling("sd3")), Prompt("one", PROMPT)
    for steps in (2, 5):
        assert (
            timesteps_of(pipe, Schedule(steps, "flow-euler")).tolist() == timesteps_of(pipe, Schedule(steps)).tolist()
        )
        pictures = [
            np.asarray(generate(pipe, prompt, schedule=Schedule(steps, name), guidance_scale=2.0))
            for name in (None, "flow-euler")
        ]
        np.testing.assert_array_equal(*pictures)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_beta_sigmas=True)
    assert timesteps_of(pipe, Schedule(5, "flow-euler")).tolist() != timesteps_of(pipe, Schedule(5)).tolist()


def test_karras_sigmas_of_flow_matching_are_refused_where_diffusers_ends_in_nan() -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    own = DPMSolverMultistepScheduler(**flow)
    with pytest.raises(InputError, match=r"DPMSolverMultistepScheduler ends 6 steps with values that are no numbers"):
        with_steps(scheduler_by_name("dpm++2m-karras", own), 6)
    with pytest.raises(InputError, match=r"use dpm\+\+2m, unipc, or name none"):
        scheduler_by_name("ddim", own)


@pytest.mark.parametrize(
    ("name", "karras"),
    [("DPMSolverMultistepScheduler", False), ("UniPCMultistepScheduler", False), ("UniPCMultistepScheduler", True)],
)
def test_solvers_of_flow_matching_draw_as_diffusers(name: str, karras: bool) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for family in ("sd3", "sdxl"):
        pipe = load_pipeline(sibling(family))
        pipe.scheduler = of_class(name, **flow, use_karras_sigmas=karras)(pipe.scheduler)
        denoiser = whole_denoiser(pipe, 6)
        assert denoiser.timesteps.flow_matching
        pictures = [
            np.asarray(generate(one, Prompt("one", PROMPT), schedule=Schedule(6), guidance_scale=2.0))
            for one in (pipe, with_denoiser(pipe, denoiser))
        ]
        np.testing.assert_array_equal(*pictures)
    with pytest.raises(InputError, match=f"{name} is of flow matching, which is supported where"):
        timestep_table_of(pipe.scheduler, 6, fractional=False)


@pytest.mark.parametrize("name", PRESERVING)
def test_there_are_no_more_steps_than_training_timesteps(base: StableDiffusionPipeline, name: str) -> None:
    """diffusers would denoise at one timestep over and over."""
    with pytest.raises(InputError, match=r"cannot do 1001 steps: training had 1000 timesteps"):
        timesteps_of(base, Schedule(1001, name))


@pytest.mark.parametrize(
    ("kind", "steps", "strength", "skipped"),
    [
        (DDIMScheduler, 10, 1.0, 0),
        (DDIMScheduler, 10, 0.3, 7),
        (DDIMScheduler, 10, 0.35, 7),
        (HeunDiscreteScheduler, 10, 0.3, 14),
    ],
)
def test_what_a_schedule_begins_without_is_what_diffusers_skips(
    kind: type, steps: int, strength: float, skipped: int
) -> None:
    scheduler = kind()
    scheduler.set_timesteps(steps)
    assert skipped_calls(scheduler, steps, strength) == skipped
    pipe = SimpleNamespace(scheduler=scheduler)
    expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    assert scheduler.timesteps[skipped:].tolist() == expected.tolist()
