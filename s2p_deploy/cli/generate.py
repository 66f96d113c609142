"""``s2p-deploy generate``: one picture from an engine."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    writable_file,
)
from s2p_deploy.cli.output import Outcome, show
from s2p_deploy.context import MOST_SEED
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from s2p_deploy.pipeline import Control, ImagePrompt, StartPicture

SizeOption = Annotated[
    int | None, typer.Option(min=1, metavar="PIXELS", help="Size of the picture, if the engine takes several.")
]

ImageOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A picture to start from, of the size that is drawn.")
]
StrengthOption = Annotated[
    float | None,
    typer.Option(metavar="NUMBER", help="How far --image may be left, above 0 to 1; 0.8, with --mask 1 if omitted."),
]
MaskOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What of --image is drawn anew: transparent parts, else white ones."),
]
LorasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="A LoRA that acts, for an engine with low-rank branches (export --lora-rank); repeatable.",
    ),
]
ControlNetsOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FOLDER", help="A ControlNet in diffusers format, of an engine exported for it; may be repeated."
    ),
]
ControlImagesOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="What each --controlnet reads: a picture of the size that is drawn."),
]
ControlScalesOption = Annotated[
    list[float] | None, typer.Option(metavar="NUMBER", help="Strength of each --controlnet; 1 if omitted.")
]
IpAdaptersOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="An IP-Adapter with the folder image_encoder beside it, of an engine exported with --image-tokens; "
        "may be repeated.",
    ),
]
IpImagesOption = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="What each --ip-adapter reads: a picture.")
]
IpScalesOption = Annotated[
    list[float] | None, typer.Option(metavar="NUMBER", help="Strength of each --ip-adapter; 1 if omitted.")
]


def generate(  # noqa: PLR0913 - its options
    engine: EngineArgument,
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The prompt.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.png", help="The picture to write.", callback=writable_file)
    ],
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the noise.")] = 0,
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
    long_prompts: Annotated[
        bool,
        typer.Option(
            help="Read prompts longer than the text encoder in chunks, with an engine that takes several; else their "
            "end is left out."
        ),
    ] = False,
    image: ImageOption = None,
    strength: StrengthOption = None,
    mask: MaskOption = None,
    lora: LorasOption = None,
    controlnet: ControlNetsOption = None,
    control_image: ControlImagesOption = None,
    control_scale: ControlScalesOption = None,
    ip_adapter: IpAdaptersOption = None,
    ip_image: IpImagesOption = None,
    ip_scale: IpScalesOption = None,
    model: ModelOption = None,
    components: ComponentsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Generate one picture with an engine in a stock diffusers pipeline.

    Omitted options are the recipe's; height and width are those that the denoiser was trained on, or of --image.
    """
    from s2p_deploy.api import as_engine, as_loras, base_of, open_pipeline

    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} must end in .png")
    start = _start_picture(image, strength, mask, sized=height is not None or width is not None)
    loras = as_loras(lora or ())
    named = _with_pictures("control", "controlnet", controlnet or [], control_image or [], control_scale or [])
    prompts = _with_pictures("ip", "ip-adapter", ip_adapter or [], ip_image or [], ip_scale or [])
    opened = as_engine(engine, public_key)
    base = base_of(opened.manifest, model)
    from s2p_deploy.families import divide_text
    from s2p_deploy.families.pipelines import check_draws_from_text
    from s2p_deploy.pipeline import Schedule, picture_size, timesteps_from_start, timesteps_of
    from s2p_deploy.pipeline import generate as draw
    from s2p_deploy.pipeline.lora_files import loras_acting
    from s2p_deploy.recipe import recipe_from_data
    from s2p_deploy.records import Prompt
    from s2p_deploy.timesteps import scale_origins

    sampling = recipe_from_data(opened.manifest.recipe, str(engine)).sampling
    guidance = sampling.guidance(base.default_guidance) if guidance_scale is None else guidance_scale
    if start is None:
        check_draws_from_text(base.pipeline_class)
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
        loras_acting(pipeline.pipe, base, loras),
        _opened_controls(pipeline.pipe, named, context.device) as controls,
    ):
        pipe, request = pipeline.pipe, Prompt("command line", prompt)
        if start is None:
            schedule = replace(schedule, size=picture_size(pipe, height, width))
            timesteps = timesteps_of(pipe, schedule)
        else:
            schedule = replace(schedule, size=start.size)
            timesteps = timesteps_from_start(pipe, schedule, start)
        picture = draw(
            pipe,
            request,
            schedule=schedule,
            guidance_scale=guidance,
            seed=seed,
            long_prompts=long_prompts,
            start=start,
            controls=controls,
            images=[_image_prompt(pipe, *each) for each in prompts],
        )
        chunks = len(divide_text(pipe, prompt))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    data = {"picture": str(out), "prompt": prompt, "seed": seed, "scheduler": scheduler, "steps": schedule.steps}
    origins, cut = scale_origins(timesteps, opened.timesteps), chunks > 1 and not long_prompts
    text = (
        f"{out}: {picture.width}x{picture.height} pixels, {schedule.steps} steps, seed {seed}",
        f"Scales of the timesteps: {origins}",
        *([f"The prompt has {chunks} chunks, only the first was read (--long-prompts reads all)"] if cut else []),
    )
    more = {"guidance_scale": guidance, "timesteps": asdict(origins), "chunks": 1 if cut else chunks, "cut": cut}
    return show(Outcome(data | more, text), as_json=as_json)


def _with_pictures(
    prefix: str, option: str, paths: list[Path], images: list[Path], scales: list[float]
) -> list[tuple[Path, Path, float]]:
    """Puts together what each adapter reads and how strong it is."""
    given = f"{len(paths)} --{option} and"
    if len(paths) != len(images):
        raise InputError(f"{given} {len(images)} --{prefix}-image: give one picture for each")
    if len(scales) not in {0, len(paths)}:
        raise InputError(f"{given} {len(scales)} --{prefix}-scale: give one for each, or none")
    return list(zip(paths, images, scales or [1.0] * len(paths), strict=True))


def _image_prompt(pipe: DiffusionPipeline, file: Path, image: Path, scale: float) -> ImagePrompt:
    """Loads an IP-Adapter for a pipeline, and its picture."""
    from s2p_deploy.pipeline import ImagePrompt, IpAdapter

    return ImagePrompt(IpAdapter.load(file, pipe), _read_picture(image, "image prompt"), scale)


def _read_picture(file: Path, what: str) -> Image:
    from s2p_deploy.pipeline.start_picture import read_picture

    try:
        return read_picture(_bytes_of(file), what)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


@contextmanager
def _opened_controls(
    pipe: DiffusionPipeline, named: list[tuple[Path, Path, float]], device: str
) -> Iterator[list[Control]]:
    """Loads ControlNets for a pipeline, and their pictures; those that are engines are closed afterwards."""
    from s2p_deploy.families import denoiser_of
    from s2p_deploy.pipeline import Control, EngineControlNet, open_controlnet

    denoiser, controls = denoiser_of(pipe), []
    with ExitStack() as opened:
        for folder, image, scale in named:
            picture = _read_picture(image, "control picture")
            network = open_controlnet(folder, dict(denoiser.config), pipe.vae_scale_factor, denoiser.dtype, device)
            if isinstance(network, EngineControlNet):
                opened.callback(network.close)
            controls.append(Control(network.to(pipe.device), picture, scale))
        yield controls


def _start_picture(
    image: Path | None, strength: float | None, mask: Path | None, *, sized: bool
) -> StartPicture | None:
    """Reads the picture to start from; None where there is none."""
    if image is None:
        if strength is not None or mask is not None:
            raise InputError(f"--{'mask' if strength is None else 'strength'} needs --image: pass the picture too")
        return None
    if sized:
        raise InputError("with --image the picture's own size is drawn: leave --height and --width out")
    from s2p_deploy.pipeline import StartPicture

    picture, marks = (None if file is None else _bytes_of(file) for file in (image, mask))
    assert picture is not None, "there is one"
    try:
        return StartPicture.read(picture, marks, strength=strength)
    except InputError as error:
        raise InputError(f"{image}{'' if mask is None else f' and {mask}'}: {error}") from error


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a PNG, JPEG or WebP file") from error
