"""Schedulers by the names of the command line."""

from __future__ import annotations

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

# What a name stands for, on top of the noise schedule of the pipeline's own scheduler. Latents are no pictures: x0 must
# not be clipped to [-1, 1]. Whether sigmas are Karras's is said for every solver that knows them, because options of
# the pipeline's scheduler go on otherwise. Euler's steps lie between timesteps unless their spacing is leading.
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
    """Names of the schedulers that can be asked for."""
    return tuple(_SCHEDULERS)


def scheduler_by_name(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A fresh scheduler of a name, with the noise schedule of another scheduler's configuration.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}: use one of {', '.join(_SCHEDULERS)}")
    kind, options = _SCHEDULERS[name]
    return kind.from_config(config, **options)  # type: ignore[attr-defined]  # diffusers is not typed
