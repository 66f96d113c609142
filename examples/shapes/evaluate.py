"""Judges pipelines: attribute accuracy over held-out prompts, and a grid of pictures to look at.

python examples/shapes/evaluate.py --out docs/images/shapes.png [--prompts 200] [--guidance 2.0 2.5 3.0]
python examples/shapes/evaluate.py --model tests/assets/pipelines/shapes-* --out grid.png --shown 20
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import Prompt, read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BATCH = 50


def main() -> None:
    """Draws, scores, prints one JSON line per guidance scale, and writes the grid of each pipeline's last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["shapes"], help="shapes, or folders of siblings")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shown", type=int, default=40, help="pictures of each pipeline in the grid")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, help="the pipeline's own default if not given")
    parser.add_argument("--guidance", type=float, nargs="*", help="what sampling.json says if not given")
    options = parser.parse_args()
    held_out = resolve_base("shapes").folder / "prompts" / "held_out.jsonl"
    prompts = read_prompts(held_out).first(options.prompts).prompts
    shown = []
    for model in options.model:
        shown += judge(model, prompts, options.steps, options.guidance)[: options.shown]
    if options.out:
        write_grid(shown, options.out)


def judge(
    model: str, prompts: tuple[Prompt, ...], steps: int | None, guidances: list[float] | None
) -> list[np.ndarray]:
    """Prints the accuracy of a pipeline at each guidance scale; the pictures are those of the last one."""
    base = resolve_base(model)
    pipe = load_pipeline(base)
    steps = steps or inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    pictures: list[np.ndarray] = []
    for guidance in guidances or [base.default_guidance]:
        began = time.monotonic()
        pictures = draw(pipe, prompts, steps, guidance)
        result = {
            "model": Path(model).name,
            "steps": steps,
            "guidance": guidance,
            "prompts": len(prompts),
            "accuracy": round(attribute_accuracy(pictures, [prompt.text for prompt in prompts]), 4),
            "seconds": round(time.monotonic() - began),
        }
        print(json.dumps(result), flush=True)
    return pictures


def draw(pipe: DiffusionPipeline, prompts: tuple[Prompt, ...], steps: int, guidance: float) -> list[np.ndarray]:
    """Pictures uint8 [64, 64, 3] of all prompts; each prompt's noise comes from its id."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
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
    """Makes a grid of pictures, ``zoom`` times as large."""
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    file.parent.mkdir(parents=True, exist_ok=True)
    grid = np.concatenate([row for row in rows if row.shape == rows[0].shape], 0)
    Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1)).save(file)


if __name__ == "__main__":
    main()
