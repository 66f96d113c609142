"""The trained adapters of the bundled pipelines are small, load in stock diffusers, and change pictures as they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy
from s2p_deploy.shapes.scenes import Scene, SceneObject, caption, parse
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"
LORAS = ASSETS / "loras"
RANKS = {"triangles": 4, "next-colour": 8, "mirrored": 32, "sdxl-triangles": 8}


def held_out(count: int) -> list[str]:
    prompts = read_prompts(resolve_base("shapes").folder / "prompts" / "held_out.jsonl").first(count).prompts
    return [prompt.text for prompt in prompts]


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(pipe: DiffusionPipeline, texts: list[str], guidance: float = 2.0, steps: int = 20, **given: object) -> list:
    drawn = pipe(
        texts,
        latents=noise(len(texts)),
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
