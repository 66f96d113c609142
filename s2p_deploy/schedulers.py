"""Schedulers: by the names of the command line, beside a pipeline's own, and walked once before any work."""

from __future__ import annotations

import copy
import inspect
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from diffusers import SchedulerMixin
    from torch import Tensor

# Class and options by name; the noise schedule is that of the pipeline's own scheduler. Latents are no pictures, so x0
# must not be clipped to [-1, 1]. Euler's timesteps are integers only with leading spacing.
_SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler-linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler-karras": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    "heun": (HeunDiscreteScheduler, {"timestep_spacing": "leading"}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {"clip_sample": False}),
    "flow-euler": (FlowMatchEulerDiscreteScheduler, {}),
}
# Exclude each other, and the own scheduler may have another one: the name alone says which it is.
_SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# What the network was trained with: taken from the own scheduler also where it has that by default, because other
# classes have other defaults.
_TRAINED_WITH = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
_ZERO_SNR = "rescale_betas_zero_snr"
_FEW_STEPS = 4  # that every scheduler takes
_SAME_ALPHAS = 1e-6  # where it is zero, some schedulers take 2**-24


def scheduler_names() -> tuple[str, ...]:
    """Lists the names of the schedulers."""
    return tuple(_SCHEDULERS)


def scheduler_by_name(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """Makes a fresh scheduler by its name, with the noise schedule of a pipeline's own scheduler.

    The name decides how sigmas are spaced: what the own scheduler says of Karras, exponential, beta or Lu's sigmas is
    switched off.

    Raises:
        InputError: there is no scheduler of that name, or it is for networks that predict something else, or cannot
            have that noise schedule.
    """
    if name not in _SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}: use one of {', '.join(_SCHEDULERS)}")
    try:
        return _replacement(name, own)
    except InputError as error:
        others = ", ".join(other for other in _SCHEDULERS if _replaces(other, own))
        remedy = f"use {others}, or name none" if others else "name none"
        raise InputError(
            f"scheduler {name!r} {error}: {remedy}, for the pipeline's own {type(own).__name__}"
        ) from error


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Tells schedulers of flow matching from variance-preserving ones, whose networks predict noise, v or x0."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return hasattr(scheduler, "scale_noise")
    return "use_flow_sigmas" in _options(type(scheduler)) and bool(scheduler.config.use_flow_sigmas)


def with_steps(scheduler: SchedulerMixin, steps: int) -> SchedulerMixin:
    """Copies a scheduler, fresh, and sets its timesteps; they were walked once, with small latents.

    So nothing that the scheduler's options lead to comes up later, in the middle of the work.

    Raises:
        InputError: it has no such number of steps, or options that are not supported or that no picture can be drawn
            with.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("use_dynamic_shifting"):
        raise InputError(
            f"{name} has dynamic shifting (use_dynamic_shifting), which is not supported, because its timesteps depend"
            " on the picture's size: set it to false and give shift a number"
        )
    # any exception: whatever a third party's code raises on a third party's configuration is the configuration's fault
    try:
        if steps > config.num_train_timesteps and not is_flow_matching(scheduler):
            raise InputError(f"{name} cannot do {steps} steps: training had {config.num_train_timesteps} timesteps")
        fresh = type(scheduler).from_config(config)
        fresh.set_timesteps(steps)
        _check_timesteps(fresh)
        latents = _walked(copy.deepcopy(fresh))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name}, as it is configured, cannot do {steps} steps: {_one_line(error)} (sampling.steps, --steps)"
        ) from error
    if not torch.isfinite(latents).all():
        raise InputError(
            f"{name} ends {steps} steps with values that are no numbers (timestep_spacing"
            f" {config.get('timestep_spacing')}, prediction_type {config.get('prediction_type')},"
            f" rescale_betas_zero_snr {config.get('rescale_betas_zero_snr')}): change its configuration"
        )
    return fresh


def skipped_calls(scheduler: SchedulerMixin, steps: int, strength: float) -> int:
    """Counts the calls that a schedule begins without: a picture that is changed is noised to a share of it.

    Raises:
        InputError: no step is left.
    """
    run = min(int(steps * strength), steps)  # as diffusers' pipelines count
    if run < 1:
        raise InputError(f"strength {strength:g} of {steps} steps leaves none: give more of either")
    return (steps - run) * int(getattr(scheduler, "order", 1))


def noised(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Noises clean latents to the noise level of a timestep [1]."""
    if hasattr(scheduler, "scale_noise"):
        scaled: Tensor = scheduler.scale_noise(latents, timestep, noise)
        return scaled
    added: Tensor = scheduler.add_noise(latents, noise, timestep)
    return added


def first_latents(scheduler: SchedulerMixin, noise: Tensor) -> Tensor:
    """Scales standard normal noise to the first latents; flow matching starts from the noise itself."""
    latents: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    return latents


def denoiser_input(scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """Scales latents to the denoiser's input at a timestep; flow matching passes them unchanged."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    scaled: Tensor = scheduler.scale_model_input(latents, timestep)
    return scaled


def stepped(
    scheduler: SchedulerMixin,
    output: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator],
) -> Tensor:
    """Computes the latents after a timestep; ``generator`` draws the noise of schedulers that add some."""
    step: Any = scheduler.step
    draws = "generator" in inspect.signature(step).parameters
    drawing: dict[str, Any] = {"generator": generator} if draws else {}
    result: Tensor = step(output, timestep, latents, return_dict=False, **drawing)[0]
    return result


def on_host(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Copies a scheduler, fresh, whose timesteps stay on the CPU whatever the device of its pipeline.

    diffusers' schedulers compare timesteps with Python numbers: on a GPU each comparison waits for it, with DDIM six
    times in a step.
    """
    scheduler_class: type = type(scheduler)
    return _host_class(scheduler_class).from_config(scheduler.config)  # type: ignore[attr-defined]  # as above


@cache
def _host_class(scheduler_class: type) -> type:
    """Derives a scheduler class whose ``set_timesteps`` ignores the device; its name and options stay."""
    inner = scheduler_class.set_timesteps  # type: ignore[attr-defined]  # as above

    @wraps(inner)  # pipelines look at its parameters
    def set_timesteps(self: SchedulerMixin, *args: object, **options: object) -> None:
        inner(self, *args, **{name: value for name, value in options.items() if name != "device"})

    return type(scheduler_class.__name__, (scheduler_class,), {"set_timesteps": set_timesteps})


def _replacement(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """Makes a scheduler by its name that can take the place of ``own``.

    Raises:
        InputError: it cannot; the message says why, without a subject.
    """
    scheduler_class, options = _SCHEDULERS[name]
    known = _options(scheduler_class)
    by_default = set(own.config.get("_use_default_values", ())) - _TRAINED_WITH
    kept = {option: own.config[option] for option in known if option in own.config and option not in by_default}
    spacings = {option: False for option in _SIGMA_SPACINGS if option in known}
    try:
        scheduler: SchedulerMixin = scheduler_class(**kept | spacings | options)
    except Exception as error:  # as in with_steps
        raise InputError(f"does not take this pipeline's noise schedule ({_one_line(error)})") from error
    flow, own_flow = is_flow_matching(scheduler), is_flow_matching(own)
    if flow != own_flow:
        kinds = {True: "flow matching", False: "networks that predict noise, v or x0"}
        raise InputError(f"is for {kinds[flow]}, this pipeline for {kinds[own_flow]}")
    if hasattr(own, "init_noise_sigma") and not hasattr(scheduler, "init_noise_sigma"):
        raise InputError("scales no noise, which this pipeline's scheduler does")
    alphas, own_alphas = (getattr(one, "alphas_cumprod", None) for one in (scheduler, own))
    if alphas is None or own_alphas is None:
        return scheduler
    if alphas.shape != own_alphas.shape or not torch.allclose(alphas, own_alphas, rtol=0, atol=_SAME_ALPHAS):
        lacks = own.config.get(_ZERO_SNR) and _ZERO_SNR not in known
        raise InputError(f"cannot have this pipeline's noise schedule{f' ({_ZERO_SNR})' if lacks else ''}")
    return scheduler


def _replaces(name: str, own: SchedulerMixin) -> bool:
    try:
        with_steps(_replacement(name, own), _FEW_STEPS)
    except InputError:
        return False
    return True


def _options(scheduler_class: type) -> Collection[str]:
    """Lists the options of a scheduler's class; a configuration may hold those of other classes too."""
    return inspect.signature(scheduler_class.__init__).parameters  # type: ignore[misc]  # of the class itself


def _check_timesteps(scheduler: SchedulerMixin) -> None:
    """Raises InputError unless a scheduler asks for timesteps that networks were trained on."""
    timesteps, training = scheduler.timesteps, scheduler.config.num_train_timesteps
    foreign = timesteps[~((timesteps >= 0) & (timesteps <= training))]
    if len(foreign):
        continuous = scheduler.config.get("timestep_type") == "continuous"
        reason = "timestep_type continuous is not supported" if continuous else "change its configuration"
        raise InputError(
            f"{type(scheduler).__name__} asks for timestep {float(foreign[0]):g}, which is none of training's 0 to"
            f" {training}: {reason}"
        )


def _walked(scheduler: SchedulerMixin) -> Tensor:
    """Walks all timesteps of a scheduler with noise for a denoiser's output; returns the last latents."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, 2, 2), generator=generator)
    latents = first_latents(scheduler, noise)
    for timestep in scheduler.timesteps:
        output = denoiser_input(scheduler, latents, timestep)
        latents = stepped(scheduler, output, timestep, latents, generator)
    return latents


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
