"""The last steps in floating point: what an engine rounds there is seen in the picture, and earlier steps mend theirs.

    s2p-deploy build graph --backend openvino --out engine
    python examples/last_steps.py engine MODEL "a small red circle at the top left, white background" picture.png

MODEL is what the engine was calibrated from. Its own network lies in memory beside the engine, and makes the last
calls. research/results.md says how much closer the pictures come.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import open_pipeline
from s2p_deploy.families import denoiser_of, load_pipeline, resolve_base

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calls", type=int, default=4, help="how many of the last calls are in floating point")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = resolve_base(options.model)
    own = denoiser_of(load_pipeline(base))
    with open_pipeline(options.engine, model=base) as opened:
        picture = draw(
            opened.pipe,
            own,
            options.calls,
            prompt=options.prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(options.seed),
        )
    picture.save(options.out)
    print(f"{options.out}: the last {options.calls} calls in floating point")


def draw(pipe: DiffusionPipeline, own: torch.nn.Module, calls: int, **arguments: Any) -> Image:  # noqa: ANN401 - the pipeline's own
    """Draws with a stock pipeline, whose denoiser gives way to its ``own`` network for the last ``calls``."""
    denoiser = denoiser_of(pipe)
    component = next(name for name, part in pipe.components.items() if part is denoiser)

    def hand_over(pipe: DiffusionPipeline, call: int, _timestep: object, _tensors: dict[str, Any]) -> dict[str, Any]:
        if len(pipe.scheduler.timesteps) - (call + 1) <= calls:
            setattr(pipe, component, own)
        return {}

    try:
        picture: Image = pipe(**arguments, callback_on_step_end=hand_over).images[0]
    finally:
        setattr(pipe, component, denoiser)
    return picture


if __name__ == "__main__":
    main()
