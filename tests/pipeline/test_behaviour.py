"""What diffusers' own tests ask of a pipeline, in this project's words: engine against the stock denoiser.

Every behaviour is a call that both pipelines are given, with generators of the same seeds. An engine of recipe fp draws
the same to 1e-4, one of W8A8 as near as its gates say.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import calibrate
from s2p_deploy.engines import BuildOptions, ShapeProfile, Span, build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, denoiser_of, load_pipeline, resolve_base, with_components
from s2p_deploy.families.pipelines import denoiser_name, for_task
from s2p_deploy.families.time_path import load_time_path
from s2p_deploy.pipeline import open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine
from s2p_deploy.shapes.scenes import parse, render
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.shared_folder import SharedFolder

pytestmark = pytest.mark.slow  # a graph of open sizes takes a minute to trace

FAMILIES = ("shapes", "sd2", "sdxl", "sd3")
PROMPTS = [
    "a large red circle at the top left, white background",
    "a small blue square at the top right, gray background",
]
STEPS, TOKENS = 14, 8
SAME = 1e-4  # of pictures in [0, 1]
PROFILE = ShapeProfile(1, 2, 8, height=Span(8, 8, 12), width=Span(8, 8, 12))
QUICK = {"dataset": {"prompts": 32}, "scales": {"latents": 32}}


def call(pipe: DiffusionPipeline, **options: object) -> np.ndarray:
    """Pictures [n, H, W, 3] in [0, 1]; a generator of one seed unless ``options`` has others."""
    flow = "StableDiffusion3" in type(pipe).__name__
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "np"}
    asked |= {"generator": generator(5)} | ({"max_sequence_length": TOKENS} if flow else {})
    return np.asarray(pipe(**asked | options).images)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture() -> Image.Image:
    return Image.fromarray(render(parse("a large green circle at the top left, white background")))


def batch(pipe: DiffusionPipeline) -> np.ndarray:
    return call(pipe, prompt=PROMPTS, negative_prompt=["a black background", "a green triangle"])


def batch_of_generators(pipe: DiffusionPipeline) -> np.ndarray:
    """Each picture is the one that its own generator gives alone."""
    together = call(pipe, prompt=PROMPTS, generator=[generator(1), generator(2)])
    alone = [call(pipe, prompt=prompt, generator=generator(seed)) for seed, prompt in enumerate(PROMPTS, 1)]
    away = np.abs(together - np.concatenate(alone)).mean((1, 2, 3))
    assert away.max() < 0.1 * np.abs(together[0] - together[1]).mean()  # codes may flip where a batch sums otherwise
    return together


def several_of_one_prompt(pipe: DiffusionPipeline) -> np.ndarray:
    found = call(pipe, prompt=PROMPTS[0], num_images_per_prompt=3)
    assert len(found) == 3
    assert np.abs(found[0] - found[1]).max() > 0.1
    return found


def without_guidance(pipe: DiffusionPipeline) -> np.ndarray:
    return call(pipe, prompt=PROMPTS[0], guidance_scale=1.0)


def latents_given(pipe: DiffusionPipeline) -> np.ndarray:
    latents = torch.randn(2, 4, 8, 8, generator=generator(9))
    found = [call(pipe, prompt=PROMPTS[0], num_images_per_prompt=2, latents=latents, generator=None) for _ in range(2)]
    np.testing.assert_allclose(*found, atol=1e-6)
    return found[0]


def embeddings_given(pipe: DiffusionPipeline) -> np.ndarray:
    """What ``encode_prompt`` returns, in the place of the prompt."""
    asked: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    flow = "StableDiffusion3" in type(pipe).__name__
    further = {"prompt_2": None, "prompt_3": None, "max_sequence_length": TOKENS} if flow else {}
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPTS[0], **asked, **further)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    found = call(pipe, **dict(zip(names, embeds, strict=False)))
    assert np.abs(found - call(pipe, prompt=PROMPTS[0])).max() < 1e-3
    return found


def callback(pipe: DiffusionPipeline) -> np.ndarray:
    """It sees every step and changes the latents."""
    seen: list[int] = []

    def halve(_pipe: object, step: int, _timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(step)
        return {"latents": tensors["latents"] * (0.9 if step == 2 else 1.0)}

    found = call(pipe, prompt=PROMPTS[0], callback_on_step_end=halve)
    assert seen == list(range(len(pipe.scheduler.timesteps)))
    return found


def interrupt(pipe: DiffusionPipeline) -> np.ndarray:
    seen: list[int] = []

    def stop(running: DiffusionPipeline, step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        running._interrupt = step == 2
        return tensors

    found = call(pipe, prompt=PROMPTS[0], callback_on_step_end=stop)
    assert seen == [0, 1, 2]
    return found


def other_steps(pipe: DiffusionPipeline) -> np.ndarray:
    return call(pipe, prompt=PROMPTS[0], num_inference_steps=STEPS + 3)


def scheduler_swapped(pipe: DiffusionPipeline) -> np.ndarray:
    """Into the pipeline, as users do; timesteps that were not named to the engine among them."""
    flow, own = "StableDiffusion3" in type(pipe).__name__, pipe.scheduler.config
    others = (
        [diffusers.FlowMatchEulerDiscreteScheduler.from_config(own, shift=shift) for shift in (1.5, 3.0)]
        if flow
        else [DDIMScheduler.from_config(own), EulerDiscreteScheduler.from_config(own, use_karras_sigmas=True)]
    )
    swapped = [with_components(pipe, {}) for _ in others]
    for one, scheduler in zip(swapped, others, strict=True):
        one.scheduler = scheduler
    return np.concatenate([call(one, prompt=PROMPTS[0]) for one in swapped])


def other_size(pipe: DiffusionPipeline) -> np.ndarray:
    found = call(pipe, prompt=PROMPTS[0], height=64, width=96)
    assert found.shape == (1, 64, 96, 3)
    return found


def from_pipe(pipe: DiffusionPipeline) -> np.ndarray:
    """Through diffusers' own switch to another task."""
    changed = AutoPipelineForImage2Image.from_pipe(pipe)
    changed.set_progress_bar_config(disable=True)
    assert denoiser_of(changed) is denoiser_of(pipe)
    return call(changed, prompt=PROMPTS[0], image=picture(), strength=0.6)


def inpainting(pipe: DiffusionPipeline) -> np.ndarray:
    if "StableDiffusion3" in type(pipe).__name__:  # where diffusers takes latents of 16 channels
        return call(pipe, prompt=PROMPTS[1])
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    sizes = {"height": 64, "width": 64}
    return call(for_task(pipe, "Inpaint"), prompt=PROMPTS[0], image=picture(), mask_image=mask, strength=1.0, **sizes)


def saved_and_loaded(pipe: DiffusionPipeline, folder: Path) -> np.ndarray:
    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}  # diffusers wants to be told
    loaded = DiffusionPipeline.from_pretrained(folder, **absent)
    loaded.set_progress_bar_config(disable=True)
    found = call(loaded, prompt=PROMPTS[0])
    np.testing.assert_allclose(found, call(pipe, prompt=PROMPTS[0]), atol=1e-5)
    return found


BEHAVIOURS: dict[str, Callable[[DiffusionPipeline], np.ndarray]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        batch,
        batch_of_generators,
        several_of_one_prompt,
        without_guidance,
        latents_given,
        embeddings_given,
        callback,
        interrupt,
        other_steps,
        scheduler_swapped,
        other_size,
        from_pipe,
        inpainting,
    )
}


@dataclass(frozen=True)
class Family:
    """A pipeline, and its engines by recipe, of open sizes and with the time table as an input."""

    name: str
    base: BasePipeline
    shared: SharedFolder

    def engine(self, recipe: str) -> Engine:
        def make(folder: Path) -> None:
            quick = {} if recipe == "fp" else QUICK
            sampling = {"sampling": {"steps": STEPS, "max_sequence_length": TOKENS}}
            prompts = None if recipe == "fp" else as_prompts("shapes:train")
            model = calibrate(self.base, Recipe.load(recipe, sampling | quick), prompts, folder / "calib")
            path = None if model.added_width else load_time_path(self.base)
            graph = export_graph(model, folder / "graph", sizes="dynamic", time_table="input", time_path=path)
            build_engine(graph, folder / "engine", backend="onnxruntime", options=BuildOptions(profile=PROFILE))

        return Engine.open(self.shared.made(f"behaviour-{self.name}-{recipe}", make) / "engine")


class Pair(NamedTuple):
    floating: DiffusionPipeline
    engine: DiffusionPipeline


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, shared: SharedFolder) -> Family:
    base = resolve_base("shapes") if request.param == "shapes" else sibling(request.param)
    return Family(request.param, base, shared)


@pytest.fixture(scope="module")
def floating(family: Family) -> DiffusionPipeline:
    return load_pipeline(family.base)


@pytest.fixture(scope="module")
def pair(family: Family, floating: DiffusionPipeline) -> Iterator[Pair]:
    with open_pipeline(family.engine("fp"), family.base) as opened:
        yield Pair(floating, opened.pipe)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_an_engine_behaves_as_the_network_that_it_replaces(pair: Pair, behaviour: str) -> None:
    expected, found = (BEHAVIOURS[behaviour](pipe) for pipe in pair)
    assert np.abs(found - expected).max() <= SAME


def test_a_saved_pipeline_is_loaded_by_diffusers(pair: Pair, tmp_path: Path) -> None:
    expected, found = (saved_and_loaded(pipe, tmp_path / name) for name, pipe in pair._asdict().items())
    assert np.abs(found - expected).max() <= SAME
    name = denoiser_name(pair.engine)
    assert (tmp_path / "engine" / name / "manifest.json").is_file()


def test_a_quantized_engine_behaves_so_within_the_gates(family: Family, floating: DiffusionPipeline) -> None:
    """Recipe w8a8's: pictures are nearer than shifted by a pixel, and predictions on the same inputs as near in every
    behaviour as in the plainest, less what single latents may be worse.
    """
    predictions: dict[str, list[float]] = {}
    pictures, shifted = [], []
    with open_pipeline(family.engine("w8a8"), family.base) as opened:
        for name, behaviour in BEHAVIOURS.items():
            with compared(denoiser_of(floating), denoiser_of(opened.pipe)) as decibels:
                expected = behaviour(floating)
            predictions[name] = decibels
            pictures += psnr(expected, behaviour(opened.pipe))
            shifted += psnr(expected, np.roll(expected, 1, 2))
    medians = {name: round(float(np.median(decibels)), 1) for name, decibels in predictions.items()}
    print(family.name, medians, np.round(pictures, 1), np.round(shifted, 1))  # noqa: T201 - with -s, or where it fails
    gates = Recipe.load("w8a8").validation.gates
    assert gates.beats_pixel_shift
    assert np.median(pictures) > np.median(shifted)
    assert min(medians.values()) >= medians["batch"] + gates.latent_margin


@contextmanager
def compared(network: torch.nn.Module, engine: torch.nn.Module) -> Iterator[list[float]]:
    """Gives every call of a network to an engine too; yields the SQNR of what that predicts, in dB."""
    decibels: list[float] = []

    def compare(_network: object, args: tuple[Any, ...], options: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        error = (engine(*args, **options)[0] - output[0]).square().mean()
        decibels.append(float(10 * torch.log10(output[0].square().mean() / error)))

    hook = network.register_forward_hook(compare, with_kwargs=True)
    try:
        yield decibels
    finally:
        hook.remove()


def psnr(expected: np.ndarray, found: np.ndarray) -> list[float]:
    """Of every picture, in dB."""
    assert found.shape == expected.shape
    decibels: list[float] = (-10 * np.log10(np.square(found - expected).mean((1, 2, 3)).clip(1e-12))).tolist()
    return decibels
