"""Pictures that a pipeline changes: masks, latents, and what an inpainting network reads of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.families.pictures import (
    PictureInputs,
    latent_pictures,
    mask_channels,
    picture_latents,
    pictures_of,
    synthetic_mask,
)
from s2p_deploy.records import Prompt, PromptSet
from s2p_deploy.shapes.scenes import parse, render
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CPU = torch.device("cpu")
PROMPTS = PromptSet((Prompt("a", "a large red square at the top left, white background"),))


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    return load_pipeline(resolve_base("shapes"))


@given(seed=st.integers(0, 2**63 - 1), height=st.integers(8, 80), width=st.integers(8, 80))
def test_a_mask_is_a_rectangle_or_everything(seed: int, height: int, width: int) -> None:
    mask = synthetic_mask(seed, height, width)
    assert mask.shape == (1, height, width)
    assert torch.equal(mask, synthetic_mask(seed, height, width))
    rows, columns = mask[0].amax(1), mask[0].amax(0)
    assert torch.equal(mask[0], rows[:, None] * columns)
    for side, covered in ((height, int(rows.sum())), (width, int(columns.sum()))):
        assert covered == side or round(side / 4) <= covered <= round(side * 3 / 4)


def test_one_mask_in_eight_covers_everything() -> None:
    whole = sum(bool(synthetic_mask(seed, 16, 16).all()) for seed in range(800))
    assert 70 <= whole <= 130


def test_latents_are_those_of_a_trained_autoencoder(pipe: DiffusionPipeline) -> None:
    scene = render(parse(PROMPTS.prompts[0].text), np.random.default_rng(0))
    pictures = torch.from_numpy(scene).permute(2, 0, 1)[None] / 255
    latents = picture_latents(pipe, pictures)
    assert latents.shape == (1, 4, 8, 8)
    assert 0.5 < float(latents.std()) < 2, "scaled to about one"
    assert float((latent_pictures(pipe, latents) - pictures).square().mean()) < 2e-3, "and back to the picture"


def test_a_masked_picture_is_grey_under_the_mask(pipe: DiffusionPipeline) -> None:
    """By hand: the right half is masked, so its latents are those of a picture that is grey there."""
    picture, mask = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    found = mask_channels(pipe, PictureInputs(picture, mask))
    assert found.shape == (1, 5, 8, 8)
    assert found[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    grey = torch.where(mask > 0, 0.5, picture)
    assert torch.equal(found[:, 1:], picture_latents(pipe, grey))
    everything = mask_channels(pipe, PictureInputs.whole(1, 64, 64))
    assert everything[:, 0].min() == 1
    assert torch.equal(everything[:, 1:], picture_latents(pipe, torch.full_like(picture, 0.5)))


def test_pictures_come_from_pipelines_that_draw_from_text_at_the_size_wanted() -> None:
    with pytest.raises(InputError, match=r"shapes draws 64x64 pixels, 32x32 are wanted"):
        pictures_of("shapes", PROMPTS, 2, (32, 32), CPU)
    refiner = str(sibling("refiner").folder)
    with pytest.raises(InputError, match="is a StableDiffusionXLImg2ImgPipeline: name a text-to-image pipeline"):
        pictures_of(refiner, PROMPTS, 2, (64, 64), CPU)
