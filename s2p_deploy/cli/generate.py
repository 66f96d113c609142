"""``s2p-deploy generate``: one picture from an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.options import JsonOption, ModelOption, base_of
from s2p_deploy.cli.outcome import Outcome, show
from s2p_deploy.errors import InputError


def generate(  # noqa: PLR0913 - its options
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="What build wrote.")],
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to draw.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="pndm, ddim, unipc or euler; the pipeline's own where left out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps; those of the recipe where left out.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1.0, help="The recipe's or pipeline's where left out.")
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> int:
    """Draw a picture with a stock diffusers pipeline whose denoiser is the engine."""
    from s2p_deploy.records import Engine, Prompt

    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} must end in .png")
    opened = Engine.open(engine)
    base = base_of(opened.manifest, model)
    from s2p_deploy.engines import load_engine
    from s2p_deploy.families import load_pipeline
    from s2p_deploy.pipeline import Schedule, pipeline_with_engine
    from s2p_deploy.pipeline import generate as draw
    from s2p_deploy.recipe import recipe_from_data

    sampling = recipe_from_data(opened.manifest.recipe, str(engine)).sampling
    schedule = Schedule(steps or sampling.steps, scheduler)
    guidance = guidance_scale or sampling.guidance_scale or base.default_guidance
    pipe = pipeline_with_engine(load_pipeline(base), opened, load_engine(opened))
    picture = draw(pipe, Prompt("command line", prompt), schedule=schedule, guidance_scale=guidance, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    data = {"picture": str(out), "prompt": prompt, "seed": seed, "steps": schedule.steps, "guidance_scale": guidance}
    return show(
        Outcome(data, (f"{out}: {picture.width}x{picture.height} pixels, {schedule.steps} steps, seed {seed}",)),
        as_json=as_json,
    )
