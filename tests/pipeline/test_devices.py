"""Device and dtype of a pipeline with an engine in it: those of the tensors around, the engine's are its own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline

from s2p_deploy.families import with_denoiser
from s2p_deploy.pipeline import EngineUNet, initial_noise

PROMPT = "a small red circle at the top left, white background"


@pytest.fixture
def pipe(base: StableDiffusionPipeline, denoiser: EngineUNet) -> StableDiffusionPipeline:
    """With components of its own: a test may move them."""
    own = {name: copy.deepcopy(base.components[name]) for name in ("vae", "text_encoder")}
    made = with_denoiser(base, copy.deepcopy(denoiser))
    made.register_modules(**own)
    return made


def draw(pipe: StableDiffusionPipeline) -> np.ndarray:
    noise = initial_noise([7], pipe.unet.config).to(pipe.dtype)
    asked = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent"}
    return pipe(PROMPT, latents=noise, **asked).images.float().numpy()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_a_pipeline_in_another_dtype_draws_almost_the_same(
    pipe: StableDiffusionPipeline, dtype: torch.dtype, error: float
) -> None:
    expected = draw(pipe)
    pipe.to(dtype)
    assert pipe.unet.dtype == pipe.dtype == dtype
    found = draw(pipe)
    assert 0 < np.abs(found - expected).max() < error * np.abs(expected).max()
    pipe.to(torch.float32)
    assert pipe.unet.dtype == torch.float32


def test_a_pipeline_may_be_moved_and_offloaded(pipe: StableDiffusionPipeline) -> None:
    """To the CPU itself: the hooks of accelerate are the same for every device."""
    expected = draw(pipe)
    pipe.to("cpu")
    np.testing.assert_array_equal(draw(pipe), expected)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(draw(pipe), expected)
    pipe.remove_all_hooks()
    assert pipe.unet.device.type == "cpu"


def test_a_denoiser_may_be_offloaded_piece_by_piece(pipe: StableDiffusionPipeline) -> None:
    """As ``enable_sequential_cpu_offload`` does with every network, and cannot with this transformers' CLIP."""
    expected = draw(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    assert pipe.unet.device.type == "meta"
    np.testing.assert_array_equal(draw(pipe), expected)


def test_a_compiled_denoiser_is_the_engine_as_it_is(pipe: StableDiffusionPipeline) -> None:
    expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    np.testing.assert_array_equal(draw(pipe), expected)


def test_a_copy_has_the_place_and_dtype_of_its_original(denoiser: EngineUNet) -> None:
    half = copy.deepcopy(denoiser).to(torch.float16)
    again = copy.deepcopy(half)
    assert again.dtype == torch.float16
    assert denoiser.dtype == torch.float32
    assert again.runner is denoiser.runner
    assert again.timesteps is denoiser.timesteps
