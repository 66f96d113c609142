"""What a refusal says to do instead works: every refusal of a pipeline with engines beside the call that it advises."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import s2p_deploy.pipeline
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, load_pipeline, with_components, with_denoiser
from s2p_deploy.pipeline import (
    EngineTextEncoder,
    Schedule,
    StartPicture,
    generate,
    open_pipeline,
    save_engine_pipeline,
    timesteps_from_start,
)
from s2p_deploy.records import Prompt
from tests.pipeline.test_start_picture import file_of, red
from tests.small_pipelines import shared_small_components, sibling, whole_denoiser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import ComponentEngines, Engine
    from tests.shared_folder import SharedFolder

PROMPT = "a small red circle at the top left, white background"
FEW = {"num_inference_steps": 2, "output_type": "latent"}
SIDE = 16  # pixels of the small pipeline's pictures


@dataclass(frozen=True)
class Given:
    """``pipe`` runs a real engine in a small pipeline, ``whole`` with component engines too."""

    floating: DiffusionPipeline
    pipe: DiffusionPipeline
    whole: DiffusionPipeline
    engine: Engine
    parts: ComponentEngines
    folder: Path


@pytest.fixture(scope="module")
def opened(engine: Engine, origin: BasePipeline, shared: SharedFolder) -> Iterator[Given]:
    parts = shared_small_components(shared, "onnxruntime")
    with open_pipeline(engine) as plain, open_pipeline(engine, components=parts) as whole:
        yield Given(load_pipeline(origin), plain.pipe, whole.pipe, engine, parts, Path())


@pytest.fixture
def given(opened: Given, tmp_path: Path) -> Given:
    return replace(opened, folder=tmp_path)


def call(pipe: DiffusionPipeline, **options: object) -> object:
    return pipe(PROMPT, **FEW, **options)


def inputs(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 4, 8, 8), torch.ones(count, 24, 128)


def denoised(given: Given, timestep: object = 1, **conditions: object) -> object:
    sample, text = inputs()
    return given.pipe.unet(sample, timestep, text, **conditions)


def sdxl() -> DiffusionPipeline:
    base = load_pipeline(sibling("sdxl"))
    return with_denoiser(base, whole_denoiser(base, 2))


def saved(given: Given, name: str = "saved") -> Path:
    given.pipe.save_pretrained(given.folder / name)
    return given.folder / name


def without_engine(given: Given) -> object:
    folder = saved(given, "lacking")
    (folder / "unet").rename(folder / "gone")
    return DiffusionPipeline.from_pretrained(folder)


def from_picture(pipe: DiffusionPipeline, side: int = SIDE, **options: object) -> object:
    start = StartPicture(red((side, side)), **{"strength": 0.5} | options)
    schedule = Schedule(4, max_sequence_length=8, size=(side, side))
    timesteps_from_start(pipe, schedule, start)
    return generate(pipe, Prompt("id", PROMPT), schedule=schedule, guidance_scale=1.0, start=start)


def read(**options: object) -> object:
    return StartPicture.read(**{"picture": file_of(red())} | options)


def sd3() -> DiffusionPipeline:
    base = load_pipeline(sibling("sd3"))
    return with_denoiser(base, whole_denoiser(base, 4))


def mask(side: int = 64) -> Image.Image:
    return Image.new("L", (side, side), "white")


IDS = torch.ones(1, 24, dtype=torch.int64)
MASKED = {"encoder_attention_mask": torch.zeros(2, 24)}
# words of the refusal: what is refused, and what it advises
ADVICE: dict[str, tuple[Callable[[Given], object], Callable[[Given], object]]] = {
    "is not that of an engine on disk": (
        lambda g: whole_denoiser(g.floating, 2).save(g.folder / "none"),
        lambda g: g.pipe.unet.save(g.folder / "one"),
    ),
    "it cannot take {refused[0]}": (
        lambda g: denoised(g, **MASKED),
        lambda g: (
            denoised(g),
            g.floating.unet(inputs()[0], 1, inputs()[1], encoder_attention_mask=torch.zeros(2, 24)),
        ),
    ),
    "that its own pipeline gives": (
        lambda _: denoiser_of(sdxl())(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 24, 224)),
        lambda _: call(sdxl()),
    ),
    "timesteps for a batch of": (
        lambda g: denoised(g, torch.tensor([1, 21, 41])),
        lambda g: (denoised(g, torch.tensor([1, 21])), denoised(g, torch.tensor(1))),
    ),
    "this engine takes latents of": (
        lambda g: call(g.pipe, height=32, width=32),
        lambda g: (call(g.pipe), call(g.pipe, latents=torch.zeros(1, 4, 8, 8))),
    ),
    "has the engines of {len(loaded)} components": (
        lambda g: EngineTextEncoder.from_pretrained(g.parts.folder),
        lambda g: open_pipeline(g.engine, components=g.parts).close(),
    ),
    "this text encoder cannot take": (
        lambda g: g.whole.text_encoder(IDS, attention_mask=0 * IDS),
        lambda g: g.floating.text_encoder(IDS, attention_mask=0 * IDS),
    ),
    "this text encoder takes": (
        lambda g: g.whole.text_encoder(IDS[:, :3]),
        lambda g: (g.whole.text_encoder(IDS), g.floating.text_encoder(IDS[:, :3])),
    ),
    "it cannot take {type(one).__name__}": (
        lambda g: g.pipe.unet.set_attn_processor(object()),
        lambda g: g.floating.unet.set_attn_processor(g.floating.unet.attn_processors),
    ),
    "leave xformers off": (
        lambda g: g.pipe.unet.set_use_memory_efficient_attention_xformers(True),
        lambda g: g.pipe.disable_xformers_memory_efficient_attention(),
    ),
    "is not pushed by itself": (
        lambda g: g.pipe.unet.save_pretrained(g.folder / "pushed", push_to_hub=True),
        lambda g: g.pipe.unet.save_pretrained(g.folder / "kept"),
    ),
    "leave device_map out, or name one device": (
        lambda g: DiffusionPipeline.from_pretrained(saved(g), device_map="balanced"),
        lambda g: DiffusionPipeline.from_pretrained(saved(g), device_map="cpu"),
    ),
    "lacks the folder of an engine": (
        without_engine,
        lambda g: DiffusionPipeline.from_pretrained(saved(g, "again")),
    ),
    "exists: choose another folder, or pass replace=True": (
        lambda g: [save_engine_pipeline(g.pipe, g.folder / "twice") for _ in range(2)],
        lambda g: save_engine_pipeline(g.pipe, g.folder / "twice", replace=True),
    ),
    "this pipeline's denoiser is no engine": (
        lambda g: save_engine_pipeline(g.floating, g.folder / "floating"),
        lambda g: g.floating.save_pretrained(g.folder / "floating"),
    ),
    "are of several artifacts": (
        lambda g: save_engine_pipeline(apart(g), g.folder / "apart"),
        lambda g: apart(g).save_pretrained(g.folder / "apart"),
    ),
    "leaves none of {schedule.steps} steps": (
        lambda g: from_picture(g.pipe, strength=0.1),
        lambda g: from_picture(g.pipe, strength=0.3),
    ),
    "as this engine draws them": (lambda g: from_picture(g.pipe, 32), lambda g: from_picture(g.pipe)),
    "takes latents of 16 channels": (
        lambda _: from_picture(sd3(), 64, mask=mask()),
        lambda _: from_picture(sd3(), 64),
    ),
    "height and width must be multiples of": (
        lambda g: generate(g.pipe, Prompt("id", PROMPT), schedule=Schedule(2, size=(15, 16)), guidance_scale=1.0),
        lambda g: generate(g.pipe, Prompt("id", PROMPT), schedule=Schedule(2, size=(16, 16)), guidance_scale=1.0),
    ),
    "is none: give one above 0, up to 1": (lambda _: read(strength=1.5), lambda _: read(strength=1.0)),
    "give a mask of the picture's size": (
        lambda _: read(mask=file_of(mask(3))),
        lambda _: read(mask=file_of(Image.new("L", (8, 6), "white"))),
    ),
    "the mask marks nothing": (
        lambda _: read(mask=file_of(Image.new("L", (8, 6)))),
        lambda _: read(mask=file_of(Image.new("LA", (8, 6)))),
    ),
    "pixels: give one of {allowed}": (lambda _: read(sizes=[(64, 64)]), lambda _: read(sizes=[(64, 64), (6, 8)])),
    "is animated: give a single picture": (
        lambda _: read(picture=file_of(red(), save_all=True, append_images=[red()])),
        lambda _: read(),
    ),
    "convert it to RGB, RGBA or grey of 8 bits": (
        lambda _: read(picture=file_of(red(mode="CMYK"), "JPEG")),
        lambda _: [read(picture=file_of(red(mode=mode))) for mode in ("RGB", "RGBA", "L")],
    ),
    "is no PNG, JPEG or WebP file": (
        lambda _: read(picture=file_of(red(), "GIF")),
        lambda _: [read(picture=file_of(red(), kind)) for kind in ("PNG", "JPEG", "WEBP")],
    ),
    "is damaged and cannot be decoded": (lambda _: read(picture=file_of(red((64, 64)))[:-40]), lambda _: read()),
}
ELSEWHERE = {
    "is given twice: give it once, with one weight": "test_lora_files.py",
    "which runs on an engine here: leave --components out": "test_lora_files.py",
    "which runs on an engine here: open the pipeline without": "test_denoiser_loras.py",
    "is no engine of a ControlNet": "../calib/test_controlnet.py",
    "is an engine of a ControlNet": "../calib/test_controlnet.py",
    "cannot be loaded, {taken}": "test_denoiser_loras.py",
    "load it first": "test_denoiser_loras.py",
    "is one finite number for all layers": "test_denoiser_loras.py",
    "give one weight for each, or one for all": "test_denoiser_loras.py",
    "give weights by name in a dict": "test_denoiser_loras.py",
    "in cross_attention_kwargs: leave it out": "test_refusals.py",
    "settings of LoRAs for a call of": "test_denoiser_loras.py",
    "NO_BRANCHES": "test_denoiser_loras.py",
    "with the pipeline's load_lora_weights": "test_denoiser_loras.py",
    "residuals of a ControlNet's down blocks": "test_control.py",
    "this engine takes no ControlNet": "test_control.py",
    "a control's scale of": "test_control.py",
    "a control that acts from": "test_control.py",
    "the control picture has": "test_control.py",
    "holds no PNG, JPEG or WebP files": "../calib/test_controlnet.py",
    "{file}: {error}": "the picture's own error",
    "an engine's network is fixed, {_ADVICE": "test_refusals.py",
    "this text encoder gives its last states alone": "test_auxiliary_components.py",
    "{components.folder}: {error}": "the size's own error",
    "has too many pixels": "test_start_picture.py",
    "a {kind} takes {wanted}": "test_generation.py",
    "seed {noise_seed} is out of range": "test_generation.py",
    "a guidance scale of {guidance_scale:g} is out of range": "test_generation.py",
    "pixels: give one of at most": "test_start_picture.py",
    "IP-Adapters at once, this engine takes": "test_image_prompts.py",
    "one tensor for each": "test_image_prompts.py",
    "as the batch": "test_image_prompts.py",
    "of another image encoder": "test_image_prompts.py",
    "has one scale per layer": "test_image_prompts.py",
    "its image projection is not whole": "test_image_prompts.py",
    "tokens, this engine takes {self.slots": "test_image_prompts.py",
    "this engine takes no image prompts": "test_image_prompts.py",
    "image prompts at once, this engine takes": "test_image_prompts.py",
    "an image prompt's scale of": "test_image_prompts.py",
    "has no image encoder": "test_image_prompts.py",
    "load it first (load_ip_adapter)": "test_image_prompts.py",
    "or unload it (unload_ip_adapter)": "test_image_prompts.py",
}


def apart(given: Given) -> DiffusionPipeline:
    """Text encoder and autoencoder of artifacts of their own, as diffusers loads them."""
    parts = {}
    for name in ("text_encoder", "vae"):
        own = given.folder / f"own-{name}"
        given.whole.components[name].save_pretrained(own)
        parts[name] = type(given.whole.components[name]).from_pretrained(own)
    return with_components(given.whole, parts)


@pytest.mark.parametrize("words", ADVICE)
def test_what_a_refusal_advises_works(given: Given, words: str) -> None:
    refused, advised = ADVICE[words]
    said = words.split("{", maxsplit=1)[0] or words
    with pytest.raises(InputError) as error:
        refused(given)
    assert said.strip() in str(error.value)
    assert "\n" not in str(error.value)
    advised(given)


def test_every_refusal_is_among_them() -> None:
    """By the text of every ``raise InputError`` of the package."""
    found = []
    for file in Path(s2p_deploy.pipeline.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            raised = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(raised, ast.Call) and getattr(raised.func, "id", "") in {"InputError", "FixedNetworkError"}:
                found.append(ast.unparse(raised.args[0]).replace("\\'", "'"))
    known = [*ADVICE, *ELSEWHERE]
    unknown = [text for text in found if not any(words in text for words in known)]
    assert not unknown
    assert not [words for words in known if not any(words in text for text in found)]
