from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from s2p_deploy.calib.training import HeldOut, held_out_trajectories, trajectory_error
from s2p_deploy.calib.trajectories import (
    FloatPipeline,
    Trajectory,
    final_latents,
    load_float_pipeline,
    trajectory_inputs,
)
from s2p_deploy.families import BasePipeline, IndexedDenoiser, denoiser_of, load_pipeline
from s2p_deploy.pipeline import initial_noise
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet
from tests.small_pipelines import sibling


@pytest.fixture
def held_out(source: FloatPipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet, recipe: Recipe) -> HeldOut:
    return held_out_trajectories(source, float_denoiser, prompts.first(3), recipe)


def test_the_teacher_ends_where_the_stock_pipeline_does(
    base: BasePipeline, held_out: HeldOut, prompts: PromptSet, recipe: Recipe
) -> None:
    stock = load_pipeline(base)
    assert [len(part.noise) for part in held_out.inputs.batches()] == [2, 1]  # the dataset's width at a time
    for prompt, expected in zip(prompts.first(3).prompts, held_out.final, strict=True):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.noise_seed))
        steps, guidance = recipe.sampling.steps, recipe.sampling.guidance_scale
        found = stock(
            prompt.text, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="latent"
        )
        torch.testing.assert_close(found.images[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_the_teacher_of_another_family_ends_where_its_stock_pipeline_does(
    name: str, prompts: PromptSet, recipe: Recipe
) -> None:
    stock = load_pipeline(sibling(name))
    steps, guidance = recipe.sampling.steps, recipe.sampling.guidance_scale
    of_family = load_float_pipeline(sibling(name), steps)
    held_out = held_out_trajectories(of_family, of_family.denoiser, prompts.first(3), recipe)
    noise = initial_noise([prompt.noise_seed for prompt in prompts.first(3).prompts], denoiser_of(stock).config)
    found = stock(
        [prompt.text for prompt in prompts.first(3).prompts],
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    )
    torch.testing.assert_close(found.images, held_out.final, rtol=1e-3, atol=1e-3)


def test_the_error_is_the_median_of_the_relative_ones(held_out: HeldOut, float_denoiser: IndexedDenoiser) -> None:
    assert trajectory_error(float_denoiser, held_out) == 0
    factors = torch.tensor([1.0, 0.5, 0.8]).view(3, 1, 1, 1)  # relative errors 0, 1 and 0.25
    assert trajectory_error(float_denoiser, replace(held_out, final=held_out.final * factors)) == pytest.approx(0.25)


@torch.no_grad()
def test_a_copied_walk_goes_the_same_way(held_out: HeldOut, float_denoiser: IndexedDenoiser) -> None:
    walk = Trajectory(next(held_out.inputs.batches()))
    for _ in range(3):
        walk.advance(walk.predict(float_denoiser))
    other = walk.copy()
    assert torch.equal(walk.finish(float_denoiser), other.finish(float_denoiser))
    assert torch.equal(walk.latents, held_out.final[:2])


def test_a_sampler_that_draws_noise_draws_the_same_each_time(
    base: BasePipeline, float_denoiser: IndexedDenoiser, prompts: PromptSet, recipe: Recipe
) -> None:
    source = load_float_pipeline(base, recipe.sampling.steps)
    source.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(source.pipe.scheduler.config)
    inputs = trajectory_inputs(source, prompts.first(3), recipe)
    assert torch.equal(final_latents(float_denoiser, inputs), final_latents(float_denoiser, inputs))
