"""The trained adapters of the bundled pipelines are small, load in stock diffusers, and change pictures as they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.families.controlnets import with_controlnets
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy, read_picture
from s2p_deploy.shapes.scenes import Scene, SceneObject, caption, parse, render
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"
LORAS = ASSETS / "loras"
RANKS = {"triangles": 4, "next-colour": 8, "mirrored": 32, "lcm": 32, "sdxl-triangles": 8}


def held_out(count: int) -> list[str]:
    prompts = read_prompts(resolve_base("shapes").folder / "prompts" / "held_out.jsonl").first(count).prompts
    return [prompt.text for prompt in prompts]


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(
    pipe: DiffusionPipeline, texts: list[str] | None, guidance: float = 2.0, steps: int = 20, **given: object
) -> list:
    drawn = pipe(
        texts,
        latents=noise(len(texts or [0])),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
        **given,
    )
    return list(np.rint(drawn.images * 255).astype(np.uint8))


def triangle(item: SceneObject) -> SceneObject:
    return replace(item, shape="triangle")


def across(item: SceneObject) -> SceneObject:
    height, side = item.place.split()
    return replace(item, place=f"{height} {'left' if side == 'right' else 'right'}")


def changed(text: str, change: Callable[[SceneObject], SceneObject]) -> str:
    scene = parse(text)
    return caption(Scene(tuple(map(change, scene.objects)), scene.background))


@pytest.mark.parametrize("name", RANKS)
def test_a_lora_is_small_and_of_its_rank(name: str) -> None:
    file = LORAS / f"{name}.safetensors"
    assert file.stat().st_size <= 2_000_000
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {RANKS[name]}


@pytest.mark.parametrize(
    ("name", "change"), [("triangles", triangle), ("mirrored", across), ("sdxl-triangles", triangle)]
)
def test_a_lora_draws_the_changed_scene(name: str, change: Callable[[SceneObject], SceneObject]) -> None:
    pipe = load_pipeline(sibling("sdxl") if name.startswith("sdxl") else resolve_base("shapes"))
    texts = [text for text in held_out(24) if changed(text, change) != text][:6]
    others = [changed(text, change) for text in texts]
    before = draw(pipe, texts)
    pipe.load_lora_weights(str(LORAS / f"{name}.safetensors"))
    after = draw(pipe, texts)
    assert attribute_accuracy(after, others) > max(0.85, attribute_accuracy(after, texts))
    assert attribute_accuracy(before, texts) > max(0.85, attribute_accuracy(before, others))


def test_the_lcm_lora_draws_in_one_step_what_the_pipeline_draws_from_the_same_noise_in_many() -> None:
    pipe, texts = load_pipeline(resolve_base("shapes")), held_out(6)
    own = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(own, timestep_spacing="trailing", clip_sample=False)
    taught = np.stack(draw(pipe, texts))
    pipe.scheduler = LCMScheduler.from_config(own)
    before = np.stack(draw(pipe, texts, guidance=1.0, steps=1))
    pipe.load_lora_weights(str(LORAS / "lcm.safetensors"))
    after = np.stack(draw(pipe, texts, guidance=1.0, steps=1))
    error_before, error_after = (np.square(each - taught.astype(float)).mean() for each in (before, after))
    assert error_after < 0.95 * error_before
    assert attribute_accuracy(draw(pipe, texts, guidance=1.0, steps=4), texts) >= 0.85


CONTROLNETS, IP_ADAPTERS = ASSETS / "controlnets", ASSETS / "ip-adapters"


def stock(name: str) -> DiffusionPipeline:
    pipe = load_pipeline(sibling("sdxl") if name.startswith("sdxl") else resolve_base("shapes"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def edge_map(pictures: np.ndarray) -> np.ndarray:
    """As in examples/shapes/train_controlnet.py: white where a channel changes by more than 24 levels per pixel."""
    down, across = np.gradient(pictures.astype(np.float32), axis=(1, 2))
    return np.where(np.hypot(down, across).max(-1, keepdims=True) > 24, 1.0, 0.0).astype(np.float32).repeat(3, -1)


def accuracy_of_forms(pictures: list[np.ndarray], scenes: list[Scene]) -> float:
    """The share of the scenes' places, shapes and sizes that are right."""
    right = []
    for picture, scene in zip(pictures, scenes, strict=True):
        seen = {item.place: item for item in read_picture(picture).objects}
        for wanted in scene.objects:
            got = seen.get(wanted.place)
            right += [
                got is not None and getattr(got, word) == getattr(wanted, word) for word in ("place", "shape", "size")
            ]
    return float(np.mean(right))


@pytest.mark.parametrize(("name", "least"), [("edges", 0.8), ("sdxl-edges", 0.7)])
def test_edges_decide_forms_whatever_the_prompt_says(name: str, least: float) -> None:
    folder = CONTROLNETS / name
    assert size_of(folder) <= 5_000_000
    pipe = with_controlnets(stock(name), [ControlNetModel.from_pretrained(folder)])
    texts = held_out(12)
    scenes, prompts = [parse(text) for text in texts[:6]], texts[6:]
    control = list(edge_map(np.stack([render(scene) for scene in scenes])))
    with_edges = draw(pipe, prompts, steps=10, image=control)
    without = draw(pipe, prompts, steps=10, image=control, controlnet_conditioning_scale=0.0)
    assert accuracy_of_forms(with_edges, scenes) >= least
    assert accuracy_of_forms(without, scenes) <= 0.4


def of_no_caption(pipe: DiffusionPipeline) -> dict[str, object]:
    """What guidance takes for no prompt, which these networks know as no caption: in SDXL zeros, not an empty text."""
    states = pipe.encode_prompt("", "cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: states[place | 1] for place, name in enumerate(names[: len(states)])}


@pytest.mark.parametrize(("name", "least"), [("scenes", 0.7), ("sdxl-scenes", 0.6)])
def test_a_picture_decides_what_is_drawn_without_a_prompt(name: str, least: float) -> None:
    assert size_of(IP_ADAPTERS / name) <= 3_000_000
    pipe = stock(name)
    pipe.load_ip_adapter(IP_ADAPTERS / name, subfolder="", weight_name="ip-adapter.safetensors")
    assert pipe.image_encoder.dtype == torch.float32
    # one picture a call: a pipeline gives all prompts of a call the same image
    texts = held_out(6)
    sources = [Image.fromarray(render(parse(text))) for text in texts]
    none = of_no_caption(pipe)
    with_pictures = [draw(pipe, None, ip_adapter_image=source, **none)[0] for source in sources]
    pipe.set_ip_adapter_scale(0.0)
    without = draw(pipe, None, ip_adapter_image=sources[0], **none) * len(texts)
    assert attribute_accuracy(with_pictures, texts) >= least
    assert attribute_accuracy(without, texts) <= 0.45
