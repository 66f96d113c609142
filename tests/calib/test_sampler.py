from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from s2p_deploy.calib.trajectories import Sampler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4


def sampler_of(scheduler: SchedulerMixin) -> Sampler:
    scheduler.set_timesteps(STEPS)
    return Sampler(scheduler, tuple(range(len(scheduler.timesteps))))


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def answered(net_input: torch.Tensor, call: int) -> torch.Tensor:
    """Stands for a denoiser: depends on the input and the call."""
    return net_input.roll(1, dims=-1) * 0.5 + 0.1 * call


def walked(sampler: Sampler, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    latents = sampler.start(noise())
    for call in range(len(sampler.indices)):
        latents = sampler.step(answered(sampler.net_input(latents, call), call), call, latents, generator)
    return latents


def test_a_scheduler_with_a_sigma_scales_noise_and_inputs() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS)
    sampler = sampler_of(scheduler)
    latents = sampler.start(noise())
    assert torch.equal(latents, noise() * scheduler.init_noise_sigma)
    found = sampler.net_input(latents, 0)
    assert torch.allclose(found, latents / (scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    assert float(found.std()) == pytest.approx(1, abs=0.1)


def test_flow_matching_starts_from_the_noise_and_is_given_the_latents() -> None:
    sampler = sampler_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(sampler.start(noise()), noise())
    assert sampler.net_input(noise(), 0) is not None
    assert torch.equal(sampler.net_input(noise(), 0), noise())
    sigmas = sampler.scheduler.sigmas
    stepped = sampler.step(torch.ones(1, 4, 8, 8), 0, noise(), torch.Generator())
    assert torch.allclose(stepped, noise() + (sigmas[1] - sigmas[0]))


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]
)
def test_a_walk_is_the_schedulers_own_loop(kind: type[SchedulerMixin]) -> None:
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    found = walked(sampler_of(kind(**BETAS, **options)), torch.Generator().manual_seed(5))
    scheduler, generator = kind(**BETAS, **options), torch.Generator().manual_seed(5)
    scheduler.set_timesteps(STEPS)
    latents = noise() * scheduler.init_noise_sigma
    given = {"generator": generator} if kind is not PNDMScheduler else {}
    for call, timestep in enumerate(scheduler.timesteps):
        output = answered(scheduler.scale_model_input(latents, timestep), call)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **given)[0]
    assert torch.equal(found, latents)


def test_a_copy_has_a_state_of_its_own() -> None:
    sampler = sampler_of(PNDMScheduler(**BETAS, skip_prk_steps=True))
    first = walked(sampler.copy(), torch.Generator())
    assert sampler.scheduler.counter == 0
    assert torch.equal(walked(sampler.copy(), torch.Generator()), first)


def test_generators_draw_the_noise_of_the_steps_that_need_any() -> None:
    sampler = sampler_of(EulerAncestralDiscreteScheduler(**BETAS))
    drawn = [walked(sampler.copy(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    several = walked(sampler.copy(), [torch.Generator().manual_seed(1)])
    assert torch.equal(several, drawn[0])
