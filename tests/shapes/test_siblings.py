"""The siblings of the bundled pipeline load in stock diffusers, are small, and draw what held-out prompts say."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from s2p_deploy.families import load_pipeline
from s2p_deploy.families.pictures import PictureInputs, pictures_of
from s2p_deploy.metrics import to_bytes
from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy
from s2p_deploy.validation.pictures import generate_pictures
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUNDLED = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))
PIPELINES = Path(__file__).parents[1] / "assets" / "pipelines"
SIBLINGS = {
    "shapes-sd2": StableDiffusionPipeline,
    "shapes-sdxl": StableDiffusionXLPipeline,
    "shapes-sd3": StableDiffusion3Pipeline,
}


FINE_TUNED = {"shapes-sd35": "sd3", "shapes-inpaint": None, "shapes-lcm": None, "shapes-refiner": "sdxl"}


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told, whatever the folder says


FEW_T5_TOKENS = {"max_sequence_length": 8}  # a third of the default's time; both are drawn below


def _load(name: str) -> DiffusionPipeline:
    pipe = SIBLINGS[name].from_pretrained(PIPELINES / name, **NO_T5 if name == "shapes-sd3" else {})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", SIBLINGS)
def test_is_small(name: str) -> None:
    files = [file for file in (PIPELINES / name).rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= 10_000_000


@pytest.mark.parametrize("name", SIBLINGS)
def test_shares_autoencoder_and_tokenizer_with_the_bundled_pipeline(name: str) -> None:
    file = "vae/diffusion_pytorch_model.safetensors"
    ours, bundled = load_file(PIPELINES / name / file), load_file(BUNDLED / file)
    assert ours.keys() == bundled.keys()
    assert all(torch.equal(ours[key], bundled[key]) for key in bundled)
    for folder in (PIPELINES / name).glob("tokenizer*"):
        assert (folder / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", SIBLINGS)
def test_loads_as_float32_throughout(name: str) -> None:
    parts = [part for part in _load(name).components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", SIBLINGS)
def test_stock_diffusers_draws_what_held_out_prompts_say(name: str) -> None:
    prompts = read_prompts(BUNDLED / "prompts" / "held_out.jsonl").first(12).prompts
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(p.noise_seed)) for p in prompts]
    texts = [prompt.text for prompt in prompts]
    drawn = _load(name)(
        texts,
        latents=torch.stack(noise),
        guidance_scale=json.loads((PIPELINES / name / "sampling.json").read_text())["guidance_scale"],
        num_inference_steps=20,
        output_type="np",
        **FEW_T5_TOKENS if name == "shapes-sd3" else {},
    )
    pictures = list(np.rint(drawn.images * 255).astype(np.uint8))
    assert attribute_accuracy(pictures, texts) >= 0.8


def test_sd2_predicts_v_with_linear_projections_and_a_head_count_per_level() -> None:
    pipe = _load("shapes-sd2")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.use_linear_projection
    assert len(set(pipe.unet.config.attention_head_dim)) > 1


def test_sdxl_draws_a_crop_where_its_size_ids_say_so() -> None:
    """Size ids are not ignored: told that 8 pixels were cropped off, it draws the same scene up and to the left."""
    pipe = _load("shapes-sdxl")
    text = "a large red square at the bottom right, white background"
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 20, "output_type": "np"}
    whole = pipe(text, latents=noise, **arguments).images[0]
    crop = pipe(text, latents=noise, original_size=(72, 72), crops_coords_top_left=(8, 8), **arguments).images[0]
    moved = np.subtract(*(_centre_of_red(picture) for picture in (whole, crop)))
    assert np.all(np.abs(moved - 8) <= 4)


def test_sd3_takes_any_number_of_missing_t5_tokens() -> None:
    pipe = _load("shapes-sd3")
    assert pipe.text_encoder_3 is None
    assert len(pipe.transformer.transformer_blocks) >= 4
    text = "a large red square at the bottom right, white background"
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for tokens in (8, 256):
        drawn = pipe(
            text,
            latents=noise,
            max_sequence_length=tokens,
            guidance_scale=2.0,
            num_inference_steps=20,
            output_type="np",
        )
        assert attribute_accuracy([np.rint(drawn.images[0] * 255).astype(np.uint8)], [text]) == 1.0


def _centre_of_red(picture: np.ndarray) -> np.ndarray:
    """Mean (row, column) of the red pixels of a picture float [64, 64, 3] in [0, 1]."""
    return np.argwhere((picture[..., 0] > 0.6) & (picture[..., 1] < 0.4)).mean(0)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_fine_tuned_sibling_has_a_denoiser_of_its_own_and_shares_the_rest(name: str) -> None:
    kind = FINE_TUNED[name]
    start = BUNDLED if kind is None else PIPELINES / f"shapes-{kind}"
    own = [file for file in (PIPELINES / name).rglob("*") if file.is_file() and not file.parent.is_symlink()]
    assert 0 < sum(file.stat().st_size for file in own) <= 10_000_000
    shared = [part for part in (PIPELINES / name).iterdir() if part.is_symlink()]
    assert {"vae", "tokenizer_2" if (start / "tokenizer_2").exists() else "tokenizer"} <= {part.name for part in shared}
    assert all(part.resolve() == (start / part.name).resolve() for part in shared)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("sd35", 14), ("lcm", 4), ("inpaint", 20), ("refiner", 20)])
@torch.no_grad()
def test_a_fine_tuned_sibling_draws_what_held_out_prompts_say(name: str, steps: int) -> None:
    base = sibling(name)
    prompts = read_prompts(BUNDLED / "prompts" / "held_out.jsonl").first(12)
    inputs = None
    if base.task == "inpainting":
        inputs = PictureInputs.whole(12, 64, 64)
    if base.task == "refining":
        drawn = pictures_of(str(PIPELINES / "shapes-sdxl"), prompts, steps, (64, 64), torch.device("cpu"))
        inputs = PictureInputs.masked(drawn, range(12))
    schedule = Schedule(steps, max_sequence_length=8, strength=base.default_strength)
    found = generate_pictures(load_pipeline(base), prompts, schedule, base.default_guidance, inputs=inputs)
    accuracy = attribute_accuracy(list(to_bytes(found.pictures)), [prompt.text for prompt in prompts.prompts])
    assert accuracy >= 0.8
