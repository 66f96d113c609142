from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline, with_denoiser
from s2p_deploy.families.pictures import PictureInputs
from s2p_deploy.pipeline import (
    EngineUNet,
    Schedule,
    StartPicture,
    call_arguments,
    generate,
    initial_noise,
    timesteps_of,
    with_schedule,
)
from s2p_deploy.records import Prompt, TimestepTable
from tests.small_pipelines import sibling

PROMPT = "a small red circle at the top left, white background"


@pytest.mark.parametrize("name", ["pndm", "ddim", "unipc", "euler", "heun", "lcm"])
def test_every_named_scheduler_runs_and_draws_the_same(
    base: StableDiffusionPipeline, denoiser: EngineUNet, name: str
) -> None:
    schedule, prompt = Schedule(5, name), Prompt("id", PROMPT)
    pictures = [
        np.asarray(generate(pipe, prompt, schedule=schedule, guidance_scale=2.5))
        for pipe in (base, with_denoiser(base, denoiser))
    ]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("schedule", [Schedule(10, "unipc"), Schedule(25, "pndm"), Schedule(10, "euler")])
def test_few_steps_stay_on_the_table_of_fifty(
    base: StableDiffusionPipeline, denoiser: EngineUNet, schedule: Schedule
) -> None:
    """Integer timesteps inside the range that 50 PNDM steps calibrate."""
    table = TimestepTable("PNDMScheduler", {}, 50, tuple(range(1, 982, 20)), np.linspace(0.1, 1.5, 1000))
    called: list[np.ndarray] = []

    def predict(sample: torch.Tensor, indices: torch.Tensor, _text: torch.Tensor) -> torch.Tensor:
        called.append(indices.numpy())
        return sample

    engine = EngineUNet(TorchRunner(predict), base.unet.config, table)
    picture = generate(with_denoiser(base, engine), Prompt("id", PROMPT), schedule=schedule, guidance_scale=2.0)
    assert picture.size == (64, 64)
    scheduler = with_schedule(base, schedule).scheduler
    scheduler.set_timesteps(schedule.steps)
    assert [int(indices[0]) for indices in called] == scheduler.timesteps.tolist()
    first, last = table.covered
    assert all(first <= indices.min() and indices.max() <= last for indices in called)


def test_the_new_pipeline_has_a_scheduler_of_its_own(base: StableDiffusionPipeline, denoiser: EngineUNet) -> None:
    pipe = with_denoiser(base, denoiser)
    assert pipe.scheduler is not base.scheduler
    assert pipe.scheduler.config == base.scheduler.config
    assert base.unet is not pipe.unet


def test_latents_are_not_clipped_as_pictures(base: StableDiffusionPipeline) -> None:
    scheduler = with_schedule(base, Schedule(5, "ddim")).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.clip_sample is False
    assert scheduler.config.beta_end == base.scheduler.config.beta_end


def test_an_unknown_scheduler_is_refused(base: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="unknown scheduler 'magic': use one of"):
        with_schedule(base, Schedule(5, "magic"))


def test_noise_depends_on_the_seed_alone() -> None:
    config = {"sample_size": [8, 6], "in_channels": 4}
    noise = initial_noise([3, 5], config)
    assert noise.shape == (2, 4, 8, 6)
    assert torch.equal(noise[1:], initial_noise([5], config))
    assert torch.equal(noise[:1], torch.randn((1, 4, 8, 6), generator=torch.Generator().manual_seed(3)))


def test_a_picture_depends_on_its_seed_or_its_prompts_id(base: StableDiffusionPipeline) -> None:
    def picture(prompt_id: str, seed: int | None) -> np.ndarray:
        prompt = Prompt(prompt_id, PROMPT)
        return np.asarray(generate(base, prompt, schedule=Schedule(3), guidance_scale=2.0, seed=seed))

    np.testing.assert_array_equal(picture("one", 4), picture("two", 4))
    np.testing.assert_array_equal(picture("one", None), picture("two", Prompt("one", PROMPT).noise_seed))
    assert not np.array_equal(picture("one", None), picture("two", None))


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(base: StableDiffusionPipeline, seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed} is out of range: give one from 0 to {2**63 - 1}"):
        generate(base, Prompt("id", PROMPT), schedule=Schedule(2), guidance_scale=2.0, seed=seed)


@pytest.mark.parametrize("scale", [-0.1, 100.1, 1e308, float("inf"), float("nan")])
def test_a_guidance_scale_that_draws_no_picture_is_refused(base: StableDiffusionPipeline, scale: float) -> None:
    with pytest.raises(InputError, match=r"guidance scale of .* is out of range: give one from 0 to 100"):
        generate(base, Prompt("id", PROMPT), schedule=Schedule(2), guidance_scale=scale)


def test_no_negative_prompt_is_none_where_no_prompt_has_any(base: StableDiffusionPipeline) -> None:
    """SDXL takes zeros then, not the states of an empty text."""
    plain, other = Prompt("a", "x"), Prompt("b", "y", "blurry")
    schedule = Schedule(5, max_sequence_length=7)
    assert call_arguments(base, [plain], schedule, 2.0)["negative_prompt"] is None
    assert call_arguments(base, [plain, other], schedule, 2.0)["negative_prompt"] == ["", "blurry"]
    assert "max_sequence_length" not in call_arguments(base, [plain], schedule, 2.0)
    assert call_arguments(load_pipeline(sibling("sd3")), [plain], schedule, 2.0)["max_sequence_length"] == 7


@pytest.mark.parametrize(
    ("name", "words"), [("inpaint", "give it a picture and a mask"), ("refiner", "give it the picture to refine")]
)
def test_a_pipeline_that_changes_pictures_is_not_asked_for_one_from_text(name: str, words: str) -> None:
    pipe = load_pipeline(sibling(name), without={"unet", "vae", "text_encoder", "text_encoder_2"})
    with pytest.raises(InputError, match=words):
        call_arguments(pipe, [Prompt("id", PROMPT)], Schedule(5), 2.0)
    found = call_arguments(pipe, [Prompt("id", PROMPT)], Schedule(5, strength=0.4), 2.0, PictureInputs.whole(1, 64, 64))
    assert found["strength"] == 0.4
    assert ("mask_image" in found) == (name == "inpaint")


def test_part_of_a_schedule_is_its_end() -> None:
    base = sibling("refiner")
    whole, part = (timesteps_of(base, Schedule(10, strength=strength)) for strength in (1.0, 0.3))
    assert part.tolist() == whole[-3:].tolist()


def test_a_pipeline_that_changes_pictures_draws_from_one() -> None:
    pipe = load_pipeline(sibling("inpaint"))
    prompt, schedule, seed = Prompt("id", PROMPT), Schedule(3), 7
    grey = StartPicture.blank(64, 64, 1.0, masked=True)
    with pytest.raises(InputError, match=r"does not draw from text alone: give it a picture and a mask"):
        generate(pipe, prompt, schedule=schedule, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"takes a mask too: what is white in it is drawn anew"):
        generate(pipe, prompt, schedule=schedule, guidance_scale=2.0, start=replace(grey, mask=None))
    drawn = generate(pipe, prompt, schedule=schedule, guidance_scale=2.0, seed=seed, start=grey)
    expected = pipe(
        PROMPT,
        image=grey.picture,
        mask_image=grey.mask,
        strength=1.0,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed ^ (1 << 62)),
    ).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_a_refiner_takes_no_mask() -> None:
    pipe = load_pipeline(sibling("refiner"))
    masked = StartPicture.blank(64, 64, 0.5, masked=True)
    with pytest.raises(InputError, match=r"takes no mask: it refines"):
        generate(pipe, Prompt("id", PROMPT), schedule=Schedule(4), guidance_scale=2.0, start=masked)
    plain = replace(masked, mask=None)
    drawn = generate(pipe, Prompt("id", PROMPT), schedule=Schedule(4), guidance_scale=2.0, start=plain)
    assert drawn.size == (64, 64)
