"""Trajectories of pipelines that change pictures, and of those without a second branch, against the stock pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from s2p_deploy.calib import dataset_request, generate_dataset
from s2p_deploy.calib.pictures import MASKED, changed_pictures, check_pictures, drawn_by
from s2p_deploy.calib.samples import samples_at
from s2p_deploy.calib.trajectories import FloatPipeline, final_latents, load_float_pipeline, trajectory_inputs
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.families.pictures import synthetic_mask
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt, PromptSet
from tests.small_pipelines import PIPELINES, sibling

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = (
    "a large red square at the top left, white background",
    "a small blue circle at the top right, gray background",
)
PROMPTS = PromptSet(tuple(Prompt(f"p{number}", text) for number, text in enumerate(TEXTS)))
STEPS = 5
SDXL = str(PIPELINES / "shapes-sdxl")
SAMPLING: dict[str, dict[str, Any]] = {
    "inpaint": {"steps": STEPS},
    "lcm": {"steps": 4},
    "refiner": {"steps": STEPS, "strength": 0.4, "pictures": SDXL},
}


def recipe_of(name: str) -> Recipe:
    base, dataset = sibling(name), {"prompts": 2, "samples_per_prompt": 20, "width": 2}
    recipe = Recipe.load("w8a8", {"sampling": SAMPLING[name], "dataset": dataset})
    return recipe.with_sampling(base.default_guidance, base.default_strength)


def source_of(name: str) -> FloatPipeline:
    sampling = recipe_of(name).sampling
    return load_float_pipeline(sibling(name), sampling.steps, strength=sampling.strength)


@pytest.mark.parametrize("name", SAMPLING)
@torch.no_grad()
def test_trajectories_are_the_stock_pipelines(name: str) -> None:
    recipe, source = recipe_of(name), source_of(name)
    started = changed_pictures(source, source.denoiser, PROMPTS, recipe)
    inputs = trajectory_inputs(source, PROMPTS, recipe, **started)
    pipe = load_pipeline(sibling(name))
    noise = inputs.noise if name == "refiner" else inputs.noise / float(pipe.scheduler.init_noise_sigma)
    asked: dict[str, Any] = {"latents": noise, "generator": [one.clone_state() for one in inputs.generators]}
    if name == "inpaint":
        asked |= {"image": torch.zeros(2, 3, 64, 64), "strength": 1.0, "masked_image_latents": started["mask"][:, 1:]}
        asked["mask_image"] = started["mask"][:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3)
    if name == "refiner":
        asked |= {"image": torch.zeros(2, 3, 64, 64), "strength": recipe.sampling.strength}
    expected = pipe(
        list(TEXTS),
        num_inference_steps=recipe.sampling.steps,
        guidance_scale=recipe.sampling.guidance_scale,
        output_type="latent",
        **asked,
    ).images
    torch.testing.assert_close(final_latents(source.denoiser, inputs), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "branches", "calls"), [("inpaint", 2, STEPS + 1), ("lcm", 1, 4), ("refiner", 2, 2)])
@torch.no_grad()
def test_a_dataset_holds_what_its_denoiser_reads_and_answers(
    name: str, branches: int, calls: int, tmp_path: Path
) -> None:
    source = source_of(name)
    dataset = generate_dataset(dataset_request(sibling(name), recipe_of(name), PROMPTS, tmp_path / "d"), source)
    channels = source.denoiser.config["in_channels"]
    assert dataset.latents.shape == (2 * calls, channels, 8, 8)
    assert dataset.cond.shape == dataset.uncond.shape == (2 * calls, 4, 8, 8)
    assert dataset.guided == (branches == 2)
    assert np.array_equal(dataset.cond[:], dataset.uncond[:]) == (branches == 1)
    pairs = samples_at(dataset, np.arange(2 * calls))
    assert len(pairs.sample) == branches * 2 * calls
    found = source.denoiser(*pairs.inputs(torch.arange(len(pairs.sample))))
    torch.testing.assert_close(found, pairs.output, atol=5e-3, rtol=2e-3)  # outputs are stored in float16


def test_every_prompt_has_a_mask_of_its_own_over_one_of_few_pictures() -> None:
    prompts = PromptSet(tuple(Prompt(f"p{number}", TEXTS[number % 2]) for number in range(MASKED + 1)))
    source, recipe = source_of("inpaint"), recipe_of("inpaint")
    short = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": STEPS})})
    mask = changed_pictures(source, source.denoiser, prompts, short)["mask"]
    assert mask.shape == (MASKED + 1, 5, 8, 8)
    masks = torch.stack([synthetic_mask(prompt.noise_seed, 64, 64) for prompt in prompts.prompts])
    assert torch.equal(mask[:, :1], torch.nn.functional.interpolate(masks, (8, 8)))


@pytest.mark.parametrize(
    ("kind", "sampling", "words"),
    [
        ("StableDiffusionXLImg2ImgPipeline", {}, "a refiner changes another pipeline's pictures: name its base model"),
        ("StableDiffusionPipeline", {"pictures": "shapes"}, "draws from text alone: leave sampling.pictures out"),
        ("StableDiffusionPipeline", {"strength": 0.5}, "on whole schedules: leave sampling.strength out"),
        ("StableDiffusionInpaintPipeline", {"strength": 0.5}, "on whole schedules: leave sampling.strength out"),
    ],
)
def test_what_is_changed_has_to_be_said_and_only_there(kind: str, sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_pictures(kind, Recipe.load("w8a8", {"sampling": sampling}))
    check_pictures("StableDiffusionInpaintPipeline", Recipe.load("w8a8"))
    check_pictures("StableDiffusionXLImg2ImgPipeline", Recipe.load("w8a8", {"sampling": {"pictures": "shapes"}}))


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"strength 0\.3 of 3 steps leaves none: give more of either"):
        load_float_pipeline(sibling("refiner"), 3)


def test_the_pipeline_that_draws_the_pictures_is_part_of_the_request() -> None:
    text = Recipe.load("w8a8")
    refined = Recipe.load("w8a8", {"sampling": {"pictures": "shapes", "strength": 0.3}})
    assert drawn_by(text) == {}
    assert drawn_by(refined) == {"pictures' pipeline": resolve_base("shapes").base.digest}
    with pytest.raises(InputError, match="does not exist"):
        drawn_by(Recipe.load("w8a8", {"sampling": {"pictures": "./none"}}))
