"""Stock diffusers pipelines of every family with a real engine in place: what users call, against floating point."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import denoiser_of, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.pipeline import pipeline_with_engine
from s2p_deploy.recipe import load_recipe
from s2p_deploy.records import PromptSet
from tests.sibling_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

PROMPTS = [
    "a large red circle at the top left, white background",
    "a small blue square at the top right, gray background",
]
STEPS, TOKENS = 6, 8
IMAGE_TO_IMAGE = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
}
TOLERANCE = 2e-3  # of pictures in [0, 1]; float32 on either side, other orders of summation


@dataclass(frozen=True)
class Pair:
    """A pipeline in floating point and the same with an engine of recipe fp."""

    floating: DiffusionPipeline
    engine: DiffusionPipeline

    def call(self, pipe: DiffusionPipeline, **options: object) -> np.ndarray:
        padded = {"max_sequence_length": TOKENS} if isinstance(pipe, diffusers.StableDiffusion3Pipeline) else {}
        generator = torch.Generator().manual_seed(5)
        found = pipe(num_inference_steps=STEPS, generator=generator, output_type="np", **padded, **options)
        return np.asarray(found.images)

    def agree(self, **options: object) -> np.ndarray:
        expected, found = (self.call(pipe, **options) for pipe in (self.floating, self.engine))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        return found


@pytest.fixture(scope="module", params=["shapes", "sd2", "sdxl", "sd3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    base = resolve_base("shapes") if request.param == "shapes" else sibling(request.param)
    sampling = {"sampling": {"steps": STEPS, "max_sequence_length": TOKENS}}
    model = calibrate(base, load_recipe("fp", sampling), PromptSet(()), folder / "calib")
    engine = build_engine(export_graph(model, folder / "graph"), "onnxruntime", folder / "engine")
    floating = load_pipeline(base)
    with load_engine(engine, schedules=[model.timesteps.timesteps[list(model.timesteps.calibrated_rows)]]) as runner:
        yield Pair(floating, pipeline_with_engine(floating, engine, runner))


def test_text_to_image(pair: Pair) -> None:
    found = pair.agree(prompt=PROMPTS, guidance_scale=2.0)
    assert found.shape == (2, 64, 64, 3)


def test_guidance_off(pair: Pair) -> None:
    found = pair.agree(prompt=PROMPTS, guidance_scale=1.0)
    guided = pair.call(pair.engine, prompt=PROMPTS, guidance_scale=2.0)
    assert np.abs(found - guided).max() > 10 * TOLERANCE, "guidance changes the picture"


def test_negative_prompts(pair: Pair) -> None:
    plain = pair.call(pair.engine, prompt=PROMPTS, guidance_scale=2.0)
    found = pair.agree(prompt=PROMPTS, guidance_scale=2.0, negative_prompt=["black background", "a large red circle"])
    assert np.abs(found - plain).max() > 10 * TOLERANCE, "a negative prompt changes the picture"


def test_several_images_per_prompt(pair: Pair) -> None:
    found = pair.agree(prompt=PROMPTS[0], guidance_scale=2.0, num_images_per_prompt=3)
    assert len(found) == 3
    assert np.abs(found[0] - found[1]).max() > 10 * TOLERANCE, "each has noise of its own"


def test_a_callback_sees_every_step_and_may_stop(pair: Pair) -> None:
    seen: list[int] = []

    def callback(pipe: DiffusionPipeline, step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 2
        return tensors

    pair.call(pair.engine, prompt=PROMPTS[0], callback_on_step_end=callback)
    assert seen == [0, 1, 2]


def test_image_to_image(pair: Pair) -> None:
    """A partial schedule: half of the steps, from a noised picture."""
    start = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    kind = getattr(diffusers, IMAGE_TO_IMAGE[type(pair.floating).__name__])
    found = []
    for pipe in (pair.floating, pair.engine):
        parts = with_denoiser(pipe, denoiser_of(pipe)).components
        taken = inspect.signature(kind.__init__).parameters
        other = kind(**{name: part for name, part in parts.items() if name in taken})
        other.set_progress_bar_config(disable=True)
        padded = {"max_sequence_length": TOKENS} if "3" in kind.__name__ else {}
        generator = torch.Generator().manual_seed(5)
        options = {"image": start, "strength": 0.5, "num_inference_steps": STEPS, "output_type": "np"}
        found.append(np.asarray(other(PROMPTS[0], generator=generator, guidance_scale=2.0, **options, **padded).images))
    np.testing.assert_allclose(found[1], found[0], atol=TOLERANCE)


def test_what_changes_the_network_is_refused(pair: Pair) -> None:
    engine = denoiser_of(pair.engine)
    name = "joint_attention_kwargs" if hasattr(pair.engine, "transformer") else "cross_attention_kwargs"
    with pytest.raises(InputError, match="an engine's network is fixed, it cannot take"):
        pair.call(pair.engine, prompt=PROMPTS[0], **{name: {"gligen": 0.5}})
    with pytest.raises(InputError, match="no LoRA can be loaded"):
        engine.load_lora_adapter({})
