"""The bundled pipeline is a real, loadable diffusers pipeline of the promised size, and draws what its prompt says."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.families import resolve_base
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy
from s2p_deploy.shapes.scenes import is_held_out, parse

FOLDER = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))


def test_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12_000_000


def test_prompt_files_keep_the_split() -> None:
    train = read_prompts(FOLDER / "prompts" / "train.jsonl").prompts
    held_out = read_prompts(FOLDER / "prompts" / "held_out.jsonl").prompts
    assert not any(is_held_out(item) for prompt in train for item in parse(prompt.text).objects)
    assert all(any(map(is_held_out, parse(prompt.text).objects)) for prompt in held_out)


def test_stock_diffusers_draws_what_held_out_prompts_say() -> None:
    base = resolve_base("shapes")
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts(FOLDER / "prompts" / "held_out.jsonl").first(12).prompts
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(p.noise_seed)) for p in prompts]
    texts = [prompt.text for prompt in prompts]
    drawn = pipe(
        texts,
        latents=torch.stack(noise),
        guidance_scale=base.default_guidance,
        num_inference_steps=20,
        output_type="np",
    )
    pictures = list(np.rint(drawn.images * 255).astype(np.uint8))
    assert attribute_accuracy(pictures, texts) >= 0.8


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(FOLDER).tokenizer
    text = "a large green triangle at the bottom left and a small purple square at the top right, gray background"
    assert len(tokenizer(text).input_ids) == len(text.replace(",", " ,").split()) + 2
