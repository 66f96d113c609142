"""The Python API from a pipeline in memory to a picture.

    python examples/python_api.py build/python_api

Takes any Stable Diffusion pipeline of diffusers; here the bundled one, trained so briefly that minutes are enough.
"""

import sys
from importlib import resources
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy import Context, Recipe, build_engine, calibrate, export_graph, open_pipeline

PROMPTS = [
    "a large red circle on the left and a small blue square on the right, white background",
    "a small green triangle at the top left, gray background",
]
# A real calibration takes the recipe as it is: recipe="w8a8".
QUICK = {
    "sampling": {"steps": 10, "guidance_scale": 3.0},
    "dataset": {"prompts": 2, "samples_per_prompt": 10, "width": 2},
    "scales": {"latents": 2},
    "training": {"iterations": 5, "batch": 4},
}


def main(out: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(resources.files("s2p_deploy") / "shapes" / "pipeline")
    context = Context(device="cpu", progress=lambda stage, done, total: print(f"{stage}: {done}/{total}", end="\r"))

    calibrated = calibrate(pipe, recipe=Recipe.load("w8a8", QUICK), prompts=PROMPTS, out=out / "calib", context=context)
    graph = export_graph(calibrated, out=out / "graph", context=context)
    engine = build_engine(graph, backend="onnxruntime", out=out / "engine", context=context)

    with open_pipeline(engine) as opened:
        noise = torch.Generator().manual_seed(1)
        image = opened.pipe(PROMPTS[0], num_inference_steps=10, guidance_scale=3.0, generator=noise).images[0]
    image.save(out / "picture.png")
    print(f"{engine.folder} generated {out / 'picture.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
