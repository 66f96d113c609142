"""``s2p-deploy generate``: one picture from an engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.options import JsonOption, ModelOption, PublicKeyOption, base_of
from s2p_deploy.cli.outcome import Outcome, show
from s2p_deploy.cli.parts import PartsOption, open_parts
from s2p_deploy.errors import InputError

SizeOption = Annotated[
    int | None, typer.Option(min=1, metavar="PIXELS", help="Of the picture, where the engine takes several sizes.")
]


def generate(  # noqa: PLR0913 - its options
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="What build wrote.")],
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to draw.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="pndm, ddim, euler, euler-linspace, euler-karras, heun, dpm++2m, dpm++2m-karras, unipc or lcm; "
            "the pipeline's own where left out. Steps between timesteps need an engine of the input form.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps; those of the recipe where left out.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1.0, help="The recipe's or pipeline's where left out.")
    ] = None,
    height: SizeOption = None,
    width: SizeOption = None,
    model: ModelOption = None,
    parts: PartsOption = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Draw a picture with a stock diffusers pipeline whose denoiser is the engine, on any schedule that it covers."""
    from s2p_deploy.records import Prompt
    from s2p_deploy.signing import open_engine

    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} must end in .png")
    opened = open_engine(engine, public_key)
    given = open_parts(parts, public_key)
    base = base_of(opened.manifest, model)
    from s2p_deploy.pipeline import Schedule, open_engine_pipeline, picture_size, timesteps_of
    from s2p_deploy.pipeline import generate as draw
    from s2p_deploy.recipe import recipe_from_data
    from s2p_deploy.timesteps import row_origins

    sampling = recipe_from_data(opened.manifest.recipe, str(engine)).sampling
    guidance = guidance_scale or sampling.guidance_scale or base.default_guidance
    schedule = Schedule(steps or sampling.steps, scheduler, sampling.max_sequence_length)
    with open_engine_pipeline(opened, base, schedules=[schedule], parts=given) as drawing:
        schedule = replace(schedule, size=picture_size(drawing.pipe, height, width))
        timesteps = timesteps_of(drawing.pipe, schedule)
        asked = Prompt("command line", prompt)
        picture = draw(drawing.pipe, asked, schedule=schedule, guidance_scale=guidance, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    data = {"picture": str(out), "prompt": prompt, "seed": seed, "scheduler": scheduler, "steps": schedule.steps}
    origins = row_origins(timesteps, opened.timesteps)
    text = (
        f"{out}: {picture.width}x{picture.height} pixels, {schedule.steps} steps, seed {seed}",
        f"Scales of the timesteps: {origins}",
    )
    return show(Outcome(data | {"guidance_scale": guidance, "timesteps": asdict(origins)}, text), as_json=as_json)
