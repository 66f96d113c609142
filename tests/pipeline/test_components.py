from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, load_pipeline, with_components, with_denoiser
from s2p_deploy.pipeline import (
    EngineTransformer,
    EngineUNet,
    Schedule,
    generate,
    initial_noise,
)
from s2p_deploy.records import Prompt
from tests.small_pipelines import sibling, whole_denoiser

PROMPT = "a small red circle at the top left, white background"


def draw(pipe: StableDiffusionPipeline, **options: object) -> np.ndarray:
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent"} | options
    noise = initial_noise([7] * (3 if "num_images_per_prompt" in options else 1), pipe.unet.config)
    return pipe(PROMPT, latents=noise, **arguments).images.numpy()


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return initial_noise(range(batch), {"sample_size": 8, "in_channels": 4}), torch.ones(batch, 24, 128)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"num_images_per_prompt": 3},
        {"negative_prompt": "a large blue square"},
        {"guidance_rescale": 0.5},
    ],
)
def test_a_stock_pipeline_draws_the_same_with_the_denoiser_in_place(
    base: StableDiffusionPipeline, denoiser: EngineUNet, options: dict[str, Any]
) -> None:
    pipe = with_denoiser(base, denoiser)
    assert type(pipe) is StableDiffusionPipeline
    pictures = draw(pipe, **options)
    assert len(pictures) == options.get("num_images_per_prompt", 1)
    np.testing.assert_array_equal(pictures, draw(base, **options))


def test_the_denoiser_reads_a_timestep_in_every_form(denoiser: EngineUNet) -> None:
    sample, text = inputs()
    forms = [501, 501.0, torch.tensor(501), torch.tensor(501.0), torch.tensor([501, 501]), torch.tensor([501.0])]
    outputs = [denoiser(sample, form, text, return_dict=False)[0] for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(denoiser(sample, 1, text).sample, outputs[0])


def test_samples_of_one_batch_may_be_on_different_timesteps(denoiser: EngineUNet) -> None:
    sample, text = inputs()
    together = denoiser(sample, torch.tensor([1, 940]), text).sample
    alone = [denoiser(sample, t, text).sample[index] for index, t in enumerate((1, 940))]
    torch.testing.assert_close(together, torch.stack(alone))


def test_the_output_is_memory_of_its_own(denoiser: EngineUNet) -> None:
    sample, text = inputs()
    before = sample.clone()
    first = denoiser(sample, 1, text).sample
    kept = first.clone()
    denoiser(-sample, 940, text)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(sample, before)


def test_the_output_is_in_the_dtype_of_the_sample(denoiser: EngineUNet) -> None:
    sample, text = inputs()
    assert denoiser(sample.half(), 1, text.half()).sample.dtype == torch.float16
    assert denoiser(sample.bfloat16(), 1, text.bfloat16()).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("timestep", [500.5, 1000, torch.tensor([1, 2, 3]), float("nan")])
def test_a_timestep_without_an_index_is_refused(denoiser: EngineUNet, timestep: torch.Tensor | float) -> None:
    sample, text = inputs()
    with pytest.raises(InputError):
        denoiser(sample, timestep, text)


@pytest.mark.parametrize(
    "condition",
    [
        {"cross_attention_kwargs": {"gligen": {}}},
        {"added_cond_kwargs": {"image_embeds": torch.ones(1)}},
        {"timestep_cond": torch.ones(2, 8)},
        {"class_labels": torch.zeros(2)},
        {"down_block_additional_residuals": (torch.ones(1),)},
        {"mid_block_additional_residual": torch.ones(1)},
    ],
)
def test_what_changes_the_network_is_refused_by_name(denoiser: EngineUNet, condition: dict[str, Any]) -> None:
    sample, text = inputs()
    with pytest.raises(InputError, match=next(iter(condition))):
        denoiser(sample, 1, text, **condition)


def test_conditions_that_ask_for_nothing_are_taken(denoiser: EngineUNet) -> None:
    sample, text = inputs()
    asked = denoiser(sample, 1, text, timestep_cond=None, cross_attention_kwargs={}, added_cond_kwargs=None).sample
    assert torch.equal(asked, denoiser(sample, 1, text).sample)
    scaled = denoiser(sample, 1, text, cross_attention_kwargs={"scale": 0.5}).sample  # of LoRAs, none of which acts
    assert torch.equal(scaled, asked)


def test_another_picture_size_is_refused(base: StableDiffusionPipeline, denoiser: EngineUNet) -> None:
    with pytest.raises(InputError, match="leave height and width out"):
        with_denoiser(base, denoiser)(PROMPT, height=32, width=32, num_inference_steps=2)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a large blue square"}, {"guidance_scale": 1.0}], ids=str)
def test_stock_pipelines_of_other_families_draw_the_same(name: str, options: dict[str, Any]) -> None:
    base, steps = load_pipeline(sibling(name)), 4
    pipe = with_denoiser(base, whole_denoiser(base, steps))
    assert type(pipe) is type(base)
    arguments = {"guidance_scale": 2.5, "num_inference_steps": steps, "output_type": "latent"} | options
    noise = initial_noise([7], denoiser_of(base).config)
    expected, found = (one(PROMPT, latents=noise, **arguments).images.numpy() for one in (base, pipe))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(*(draw_of(one, Prompt("id", PROMPT), steps) for one in (base, pipe)))


def draw_of(pipe: DiffusionPipeline, prompt: Prompt, steps: int) -> np.ndarray:
    return np.asarray(generate(pipe, prompt, schedule=Schedule(steps), guidance_scale=2.5))


def test_a_transformer_replaces_a_transformer() -> None:
    sd3, sdxl = (load_pipeline(sibling(name)) for name in ("sd3", "sdxl"))
    assert type(whole_denoiser(sd3, 4)) is EngineTransformer
    assert type(whole_denoiser(sdxl, 4)) is EngineUNet


def test_what_changes_the_network_is_refused_in_every_family() -> None:
    sdxl, sd3 = (whole_denoiser(load_pipeline(sibling(name)), 4) for name in ("sdxl", "sd3"))
    sample = initial_noise([1], sdxl.config)
    added = {"text_embeds": torch.ones(1, 96), "time_ids": torch.ones(1, 6)}
    text = torch.ones(1, 24, 224)
    assert sdxl(sample, 1, text, added_cond_kwargs=added).sample.shape == sample.shape
    with pytest.raises(InputError, match="cannot take image_embeds"):
        sdxl(sample, 1, text, added_cond_kwargs=added | {"image_embeds": torch.ones(1, 3)})
    with pytest.raises(InputError, match="cannot take timestep_cond"):
        sdxl(sample, 1, text, added_cond_kwargs=added, timestep_cond=torch.ones(1, 2))
    with pytest.raises(InputError, match="needs the pooled text"):
        sdxl(sample, 1, text)
    timestep = torch.tensor(sd3.timesteps.calibrated[:1])
    for name in ("joint_attention_kwargs", "block_controlnet_hidden_states", "skip_layers"):
        with pytest.raises(InputError, match=f"cannot take {name}"):
            sd3(sample, torch.ones(1, 30, 256), torch.ones(1, 224), timestep, **{name: [1]})


def sixteen_channels() -> StableDiffusion3Pipeline:
    """Random weights behind the small SD3's text encoders: diffusers' inpainting takes latents of 16 channels alone."""
    base = load_pipeline(sibling("sd3"))
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
    )
    config = dict(base.transformer.config) | {"in_channels": 16, "out_channels": 16, "num_layers": 1}
    return with_components(base, {"vae": autoencoder, "transformer": SD3Transformer2DModel.from_config(config)})


def test_inpainting_blends_latents_of_sixteen_channels() -> None:
    base, steps = sixteen_channels(), 4
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    asked = {"prompt": PROMPT, "image": torch.rand(1, 3, 16, 16), "mask_image": mask, "height": 16, "width": 16}
    asked |= {"num_inference_steps": steps, "strength": 1.0, "max_sequence_length": 8, "output_type": "latent"}
    found = []
    for pipe in (base, with_denoiser(base, whole_denoiser(base, steps))):
        other = StableDiffusion3InpaintPipeline(**pipe.components)
        other.set_progress_bar_config(disable=True)
        found.append(other(generator=torch.Generator().manual_seed(5), **asked).images.numpy())
    np.testing.assert_array_equal(*found)


def test_a_guidance_scale_that_is_embedded_must_be_and_is_refused_elsewhere(denoiser: EngineUNet) -> None:
    pipe = load_pipeline(sibling("lcm"))
    engine, (sample, text) = whole_denoiser(pipe, 4), inputs()
    for condition in (None, torch.zeros(2, 3)):
        with pytest.raises(InputError, match="needs the embedded guidance scale that its own pipeline gives"):
            engine(sample, 999, text, timestep_cond=condition)
    with pytest.raises(InputError, match="cannot take timestep_cond"):
        denoiser(sample, 501, text, timestep_cond=torch.zeros(2, 32))


def test_guidance_of_a_latent_consistency_model_is_an_embedding() -> None:
    """Any scale may be asked for, and no second branch is predicted."""
    pipe = load_pipeline(sibling("lcm"))
    engine = with_denoiser(pipe, whole_denoiser(pipe, 4))
    noise, drawn = initial_noise([7], pipe.unet.config), []
    for scale in (1.5, 3.0):
        asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent"}
        found, expected = (
            one(PROMPT, latents=noise, generator=torch.Generator().manual_seed(1), **asked).images.numpy()
            for one in (engine, pipe)
        )
        np.testing.assert_array_equal(found, expected)
        drawn.append(found)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inpaint", {"strength": 1.0}),
        ("inpaint", {"strength": 0.5, "guidance_scale": 1.0}),
        ("refiner", {"strength": 0.3}),
        ("refiner", {"denoising_start": 0.7, "aesthetic_score": 5.0}),
        ("refiner", {"denoising_start": 0.5, "denoising_end": 0.9}),
    ],
)
def test_pipelines_that_change_pictures_draw_the_same(name: str, options: dict[str, Any]) -> None:
    """All of a schedule or a part, with masks over any part of a picture."""
    pipe = load_pipeline(sibling(name))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = {"mask_image": (torch.arange(64) > 20).float().expand(1, 1, 64, 64)} if name == "inpaint" else {}
    asked = (
        {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "latent", "image": picture} | masks | options
    )
    found, expected = (
        one(PROMPT, generator=torch.Generator().manual_seed(3), **asked).images.numpy()
        for one in (with_denoiser(pipe, whole_denoiser(pipe, 10)), pipe)
    )
    np.testing.assert_array_equal(found, expected)
