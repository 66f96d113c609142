"""Hires fix: a picture of the trained size, enlarged and drawn on from there, with one engine of dynamic sizes.

    s2p-deploy export CALIB --out graph --sizes dynamic
    s2p-deploy build graph --backend openvino --height 8:8:16 --width 8:8:16 --out engine
    python examples/hires_fix.py engine "a small red circle at the top left, white background" picture.png

Networks draw badly at sizes they were not trained on, but keep what is there: the second pass only adds detail.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

from s2p_deploy import open_pipeline
from s2p_deploy.pipeline import Schedule, StartPicture, generate
from s2p_deploy.records import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=2.0, help="how much larger the second picture is")
    parser.add_argument("--strength", type=float, default=0.5, help="how far it may leave the first, above 0 to 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompt, schedule = Prompt("hires fix", options.prompt), Schedule(options.steps)
    drawing = {"guidance_scale": options.guidance_scale, "seed": options.seed}
    with open_pipeline(options.engine, schedules=[schedule]) as opened:
        first = generate(opened.pipe, prompt, schedule=schedule, **drawing)
        width, height = (round(options.scale * side) for side in first.size)
        enlarged = StartPicture(first.resize((width, height), Image.Resampling.LANCZOS), options.strength)
        larger = replace(schedule, size=enlarged.size)
        generate(opened.pipe, prompt, schedule=larger, start=enlarged, **drawing).save(options.out)
    print(f"{options.out}: {width}x{height} pixels")


if __name__ == "__main__":
    main()
