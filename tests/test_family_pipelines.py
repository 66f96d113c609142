"""Stock diffusers pipelines of every family with a real engine in place: what users call, against floating point."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine, load_engine
from s2p_deploy.engines.component_engines import build_component_engines
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, denoiser_of, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.families.pipelines import denoiser_name
from s2p_deploy.pipeline import (
    Schedule,
    load_engine_pipeline,
    open_pipeline,
    pipeline_with_engine,
    save_engine_pipeline,
)
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet, verify_chain
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

PROMPTS = [
    "a large red circle at the top left, white background",
    "a small blue square at the top right, gray background",
]
STEPS, TOKENS = 6, 8
TOLERANCE = 2e-3  # of pictures in [0, 1]; float32 on either side, other orders of summation


@dataclass(frozen=True)
class Pair:
    """A pipeline in floating point and the same with an engine of recipe fp."""

    base: BasePipeline
    floating: DiffusionPipeline
    engine: DiffusionPipeline

    def call(self, pipe: DiffusionPipeline, **options: object) -> np.ndarray:
        padded = {"max_sequence_length": TOKENS} if "StableDiffusion3" in type(pipe).__name__ else {}
        generator = torch.Generator().manual_seed(5)
        asked = {"num_inference_steps": STEPS, "output_type": "np"} | padded | options
        found = pipe(generator=generator, **asked)
        return np.asarray(found.images)

    def agree(self, task: str = "", **options: object) -> np.ndarray:
        expected, found = (self.call(as_task(pipe, task), **options) for pipe in (self.floating, self.engine))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        return found


@pytest.fixture(
    scope="module", params=["shapes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl", "sd3"))]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    base = resolve_base("shapes") if request.param == "shapes" else sibling(request.param)
    sampling = {"sampling": {"steps": STEPS, "max_sequence_length": TOKENS}}
    model = calibrate(base, Recipe.load("fp", sampling), PromptSet(()), folder / "calib")
    engine = build_engine(export_graph(model, folder / "graph"), folder / "engine", backend="onnxruntime")
    floating = load_pipeline(base)
    with load_engine(engine, schedules=[model.timesteps.timesteps[list(model.timesteps.calibrated_indices)]]) as runner:
        yield Pair(base, floating, pipeline_with_engine(floating, engine, runner))


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


def as_task(pipe: DiffusionPipeline, task: str) -> DiffusionPipeline:
    """The stock pipeline of the same family for another task, of the same components."""
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", f"{task}Pipeline"))
    parts = with_denoiser(pipe, denoiser_of(pipe)).components
    taken = inspect.signature(kind.__init__).parameters
    other = kind(**{name: part for name, part in parts.items() if name in taken})
    other.set_progress_bar_config(disable=True)
    return other


def picture(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


def left_half() -> torch.Tensor:
    """A mask [1, 1, 64, 64]: ones are drawn anew."""
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    return mask


def test_image_to_image(pair: Pair) -> None:
    """A partial schedule: half of the steps, from a noised picture."""
    options = {"prompt": PROMPTS[0], "image": picture(3), "guidance_scale": 2.0}
    half, whole = (pair.agree("Img2Img", strength=strength, **options) for strength in (0.5, 1.0))
    assert np.abs(half - whole).max() > 10 * TOLERANCE, "strength changes the picture"


def test_inpainting(pair: Pair) -> None:
    """Stock pipelines blend the latents of a network of as many channels as the latents have with the picture's."""
    if hasattr(pair.engine, "transformer"):
        pytest.skip("diffusers' inpainting with SD3 takes 16 channels: see tests/pipeline/test_component.py")
    options = {"image": picture(3), "mask_image": left_half(), "strength": 1.0, "height": 64, "width": 64}
    pair.agree("Inpaint", prompt=PROMPTS[0], guidance_scale=2.0, **options)
    pipe = as_task(pair.engine, "Inpaint")
    one, other = (pair.call(pipe, prompt=prompt, output_type="latent", **options) for prompt in PROMPTS)
    np.testing.assert_array_equal(one[..., 4:], other[..., 4:])
    assert np.abs(one - other)[..., :4].max() > 0.1, "the prompt changes what is drawn anew"


def test_a_pipeline_for_another_task_is_made_from_one_with_an_engine(pair: Pair) -> None:
    """With diffusers' own switches; ``from_pipe`` of one class must be told the denoiser, it trusts known classes."""
    auto = diffusers.AutoPipelineForImage2Image.from_pipe(pair.engine)
    assert denoiser_of(auto) is denoiser_of(pair.engine)
    kind, denoiser = type(as_task(pair.engine, "Inpaint")), {denoiser_name(pair.engine): denoiser_of(pair.engine)}
    assert denoiser_of(kind.from_pipe(pair.engine, **denoiser)) is denoiser_of(pair.engine)


def test_hidden_states_of_another_layer(pair: Pair) -> None:
    if type(pair.engine).__name__ == "StableDiffusionPipeline":
        pytest.skip("diffusers looks for a layer that transformers' text encoder no longer has under that name")
    plain = pair.call(pair.engine, prompt=PROMPTS[0], guidance_scale=2.0)
    found = pair.agree(prompt=PROMPTS[0], guidance_scale=2.0, clip_skip=1)
    assert np.abs(found - plain).max() > 10 * TOLERANCE, "clip_skip changes the picture"


def test_a_copy_draws_the_same_from_the_same_engine(pair: Pair) -> None:
    denoiser = denoiser_of(pair.engine)
    copied = copy.deepcopy(denoiser)
    assert copied is not denoiser
    assert copied.runner is denoiser.runner
    options = {"prompt": PROMPTS[0], "guidance_scale": 2.0}
    found = pair.call(with_denoiser(pair.engine, copied), **options)
    np.testing.assert_array_equal(found, pair.call(pair.engine, **options))


def test_a_saved_pipeline_comes_back_and_draws_the_same(pair: Pair, tmp_path: Path) -> None:
    options = {"prompt": PROMPTS[0], "guidance_scale": 2.0}
    for kept in (pair.engine, as_task(pair.engine, "Img2Img")):
        folder = tmp_path / type(kept).__name__
        save_engine_pipeline(kept, folder)
        assert [link.name for link in verify_chain(folder)[:2]] == ["", "engine"]
        with load_engine_pipeline(folder) as loaded:
            assert type(loaded.pipe) is type(kept)
            task = {} if kept is pair.engine else {"image": picture(3), "strength": 0.5}
            # not bit by bit: on some CPUs PyTorch's kernels depend on where in memory a file's weights lie
            again, first = pair.call(loaded.pipe, **task, **options), pair.call(kept, **task, **options)
            np.testing.assert_allclose(again, first, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_pipeline_without_any_pytorch_network_draws_the_same(pair: Pair, backend: str, tmp_path: Path) -> None:
    parts = build_component_engines(pair.base, tmp_path / "parts", backend=backend)
    whole = {"prompt": PROMPTS, "guidance_scale": 2.0, "negative_prompt": ["a large red circle"] * len(PROMPTS)}
    changed = {"prompt": PROMPTS[0], "guidance_scale": 2.0, "image": picture(3)}
    engine = denoiser_of(pair.engine).engine
    with open_pipeline(engine, pair.base, schedules=[Schedule(STEPS)], components=parts) as opened:
        networks = [part for part in opened.pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert len(networks) >= 3
        assert not sum(parameter.numel() for part in networks for parameter in part.parameters())
        tasks = {"": whole, "Img2Img": changed}
        if not hasattr(opened.pipe, "transformer"):  # diffusers' inpainting with SD3 takes 16 channels
            tasks["Inpaint"] = changed | {"mask_image": left_half()}
        for task, options in tasks.items():
            expected, found = (pair.call(as_task(pipe, task), **options) for pipe in (pair.engine, opened.pipe))
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_what_changes_the_network_is_refused(pair: Pair) -> None:
    engine = denoiser_of(pair.engine)
    name = "joint_attention_kwargs" if hasattr(pair.engine, "transformer") else "cross_attention_kwargs"
    with pytest.raises(InputError, match="an engine's network is fixed, it cannot take"):
        pair.call(pair.engine, prompt=PROMPTS[0], **{name: {"gligen": 0.5}})
    with pytest.raises(InputError, match="no LoRA can be loaded"):
        engine.load_lora_adapter({})
