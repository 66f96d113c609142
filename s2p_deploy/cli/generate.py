"""``s2p-deploy generate``: one picture from an engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.components import ComponentsOption
from s2p_deploy.cli.options import (
    DeviceOption,
    EngineArgument,
    JsonOption,
    ModelOption,
    PublicKeyOption,
    ThreadsOption,
    context_from_options,
)
from s2p_deploy.cli.output import Outcome, show
from s2p_deploy.errors import InputError

SizeOption = Annotated[
    int | None, typer.Option(min=1, metavar="PIXELS", help="Size of the picture, if the engine takes several.")
]


def generate(  # noqa: PLR0913 - its options
    engine: EngineArgument,
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The prompt.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="pndm, ddim, euler, euler-linspace, euler-karras, heun, dpm++2m, dpm++2m-karras, unipc, lcm or "
            "flow-euler; the pipeline's own if omitted. Fractional timesteps need an engine of the input form.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps; the recipe's if omitted.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; the recipe's or the pipeline's if omitted.")
    ] = None,
    height: SizeOption = None,
    width: SizeOption = None,
    model: ModelOption = None,
    components: ComponentsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Generate one picture with an engine in a stock diffusers pipeline.

    Omitted options are the recipe's; height and width are those that the denoiser was trained on.
    """
    from s2p_deploy.api import as_engine, base_of, open_pipeline

    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} must end in .png")
    opened = as_engine(engine, public_key)
    base = base_of(opened.manifest, model)
    from s2p_deploy.families.pipelines import check_draws_from_text
    from s2p_deploy.pipeline import Schedule, picture_size, timesteps_of
    from s2p_deploy.pipeline import generate as draw
    from s2p_deploy.recipe import recipe_from_data
    from s2p_deploy.records import Prompt
    from s2p_deploy.timesteps import scale_origins

    sampling = recipe_from_data(opened.manifest.recipe, str(engine)).sampling
    guidance = sampling.guidance(base.default_guidance) if guidance_scale is None else guidance_scale
    check_draws_from_text(base)
    schedule = Schedule(steps or sampling.steps, scheduler, sampling.max_sequence_length)
    with (
        context_from_options(device, threads) as context,
        open_pipeline(
            opened,
            model=base,
            schedules=[schedule],
            components=components,
            public_key=public_key,
            context=context,
        ) as pipeline,
    ):
        schedule = replace(schedule, size=picture_size(pipeline.pipe, height, width))
        timesteps = timesteps_of(pipeline.pipe, schedule)
        request = Prompt("command line", prompt)
        picture = draw(pipeline.pipe, request, schedule=schedule, guidance_scale=guidance, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    data = {"picture": str(out), "prompt": prompt, "seed": seed, "scheduler": scheduler, "steps": schedule.steps}
    origins = scale_origins(timesteps, opened.timesteps)
    text = (
        f"{out}: {picture.width}x{picture.height} pixels, {schedule.steps} steps, seed {seed}",
        f"Scales of the timesteps: {origins}",
    )
    return show(Outcome(data | {"guidance_scale": guidance, "timesteps": asdict(origins)}, text), as_json=as_json)
