"""Judges the bundled pipeline: attribute accuracy over held-out prompts, and a grid of pictures to look at.

python examples/shapes/evaluate.py --out docs/images/shapes.png [--prompts 200] [--guidance 2.0 2.5 3.0]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import PromptSet, read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy

BATCH = 50


def main() -> None:
    """Draws, scores, prints one JSON line per guidance scale, and writes the grid of the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, nargs="*")
    options = parser.parse_args()
    base = resolve_base(options.model)
    pipe = load_pipeline(base)
    prompts = read_prompts(base.folder / "prompts" / "held_out.jsonl").first(options.prompts)
    texts = [prompt.text for prompt in prompts.prompts]
    for guidance in options.guidance or [base.default_guidance]:
        began = time.monotonic()
        pictures = draw(pipe, prompts, options.steps, guidance)
        accuracy = attribute_accuracy(pictures, texts)
        seconds = time.monotonic() - began
        print(
            json.dumps(
                {"guidance": guidance, "prompts": len(texts), "accuracy": round(accuracy, 4), "seconds": round(seconds)}
            )
        )
        if options.out:
            write_grid(pictures[:40], options.out)


def draw(pipe: StableDiffusionPipeline, prompts: PromptSet, steps: int, guidance: float) -> list[np.ndarray]:
    """Pictures uint8 [64, 64, 3] of all prompts; each prompt's noise comes from its id."""
    pictures = []
    for start in range(0, len(prompts.prompts), BATCH):
        part = prompts.prompts[start : start + BATCH]
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(p.noise_seed)) for p in part]
        images = pipe(
            [p.text for p in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=torch.stack(noise),
            output_type="np",
        ).images
        pictures += list(np.rint(images * 255).astype(np.uint8))
    return pictures


def write_grid(pictures: list[np.ndarray], file: Path, columns: int = 10, zoom: int = 2) -> None:
    """A grid of pictures, ``zoom`` times as large."""
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    file.parent.mkdir(parents=True, exist_ok=True)
    grid = np.concatenate([row for row in rows if row.shape == rows[0].shape], 0)
    Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1)).save(file)


if __name__ == "__main__":
    main()
