"""Schedulers by the names of the command line."""

from __future__ import annotations

from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin

# Class and options by name; the noise schedule is that of the pipeline's own scheduler. Latents are no pictures, so x0
# must not be clipped to [-1, 1]. `use_karras_sigmas` is set for every solver that has it, because from_config would
# keep the value of the pipeline's scheduler otherwise. Euler's timesteps are integers only with leading spacing.
_SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "use_karras_sigmas": False}),
    "euler-linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace", "use_karras_sigmas": False}),
    "euler-karras": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    "heun": (HeunDiscreteScheduler, {"timestep_spacing": "leading", "use_karras_sigmas": False}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": False}),
    "lcm": (LCMScheduler, {"clip_sample": False}),
}


def scheduler_names() -> tuple[str, ...]:
    """Lists the names of the schedulers."""
    return tuple(_SCHEDULERS)


def scheduler_by_name(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """Makes a fresh scheduler by its name, with the noise schedule of another scheduler's configuration.

    Raises:
        InputError: there is no scheduler of that name.
    """
    if name not in _SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}: use one of {', '.join(_SCHEDULERS)}")
    scheduler_class, options = _SCHEDULERS[name]
    return scheduler_class.from_config(config, **options)  # type: ignore[attr-defined]  # diffusers is not typed


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
