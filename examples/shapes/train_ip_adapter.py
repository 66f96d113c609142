"""Trains IP-Adapters of the pipelines, and the image encoder that they share: each draws the scene of another picture.

    python examples/shapes/train_ip_adapter.py
    python examples/shapes/train_ip_adapter.py --kind sdxl
    python examples/shapes/train_ip_adapter.py --judge --picture grid.png

The picture decides the colours, also where the prompt says others, and without a prompt the whole scene. For that, most
training captions are dropped, and half of the kept ones say other colours. The image encoder is a small CLIP vision
model, trained beforehand to predict the layout of a picture, as the text encoder is for captions.

Of 30 held-out scenes' attributes, 0.847 are drawn without a prompt. With a prompt that says other colours, 0.596 of the
objects' colours are the picture's (0.327 at scale 0). The SDXL kind's: 0.761, 0.500 and 0.308. A pipeline gives all prompts of a call the same image.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from adapter_training import (
    ASSETS,
    BASES,
    draw_batch,
    encoded_captions,
    examples,
    frozen_pipeline,
    text_arguments,
)
from evaluate import write_grid
from PIL import Image
from safetensors.torch import save_file
from saved_configs import forget_origin, load_as_float32
from scenes import training_scenes
from text_encoders import layout, layout_heads, layout_loss
from training import Schedule, train
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy, read_picture
from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, PICTURE_SIZE, Scene, caption, parse, render

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

NAMES = {"sd1": "scenes", "sdxl": "sdxl-scenes"}
WEIGHTS = "ip-adapter.safetensors"
IMAGE_TOKENS = 4  # as many as diffusers takes for an adapter of this layout
IMAGE_WIDTH = 96
ENCODER_SCENES, ENCODER_BATCH = 20_000, 64
ENCODER_SCHEDULE = Schedule(iterations=1_500, peak=2e-3, warmup=100, ema=0.99)
SCHEDULE = Schedule(iterations=700, peak=3e-3, warmup=100, ema=0.99, save_every=100)
REFINEMENT = Schedule(iterations=450, peak=4e-3, warmup=20, ema=0.98, seed=1, save_every=50)
NOISY = 500  # the least timestep of the refinement: what is where is decided at high noise
DROPPED = 0.6
DROPPED_PICTURES = 0.1


def main() -> None:
    """Trains the IP-Adapter, or judges it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=NAMES, default="sd1")
    parser.add_argument("--out", type=Path, default=ASSETS / "ip-adapters", help="folder of the IP-Adapters")
    parser.add_argument("--work", type=Path, default=Path("build/ip_adapter"), help="folder of the checkpoints")
    parser.add_argument("--judge", action="store_true", help="train nothing, draw from 30 held-out scenes")
    parser.add_argument("--picture", type=Path, help="a grid of pictures and what is drawn from them")
    options = parser.parse_args()
    base, name = resolve_base(BASES[options.kind]), NAMES[options.kind]
    folder = options.out / name
    if not options.judge:
        options.work.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        encoder = image_encoder(options.work, options.out / NAMES["sd1"], own=options.kind == "sd1")
        checkpoint = options.work / f"{name}.safetensors"
        train_ip_adapter(frozen_pipeline(options.kind), encoder, checkpoint, folder / WEIGHTS)
        save_encoder(encoder, folder)
    pipe = load_pipeline(base)
    pipe.load_ip_adapter(folder, subfolder="", weight_name=WEIGHTS)
    judge(pipe, base.default_guidance, options.picture)


def image_processor() -> CLIPImageProcessor:
    """Makes what diffusers makes of pictures for an image encoder of this size."""
    return CLIPImageProcessor(size=PICTURE_SIZE, crop_size=PICTURE_SIZE)


def pixel_values(pictures: Tensor) -> Tensor:
    """Brings pictures uint8 [n, 3, 64, 64] into the form that the image encoder takes."""
    values: Tensor = image_processor()(list(pictures.permute(0, 2, 3, 1).numpy()), return_tensors="pt").pixel_values
    return values


def image_encoder(work: Path, first: Path, *, own: bool) -> CLIPVisionModelWithProjection:
    """Trains the image encoder, or loads that of the ``first`` adapter."""
    if own:
        return train_image_encoder(work)
    return CLIPVisionModelWithProjection.from_pretrained(first / "image_encoder", dtype=torch.float32).eval()


def train_image_encoder(work: Path) -> CLIPVisionModelWithProjection:
    """Trains (or goes on with) the image encoder to predict the layout of a picture."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=2 * IMAGE_WIDTH,
        projection_dim=IMAGE_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=8,
    )
    encoder = CLIPVisionModelWithProjection(config)
    net = torch.nn.ModuleDict({"encoder": encoder, **layout_heads(config.projection_dim)})
    pictures, captions = training_scenes(ENCODER_SCENES)
    layouts = torch.tensor([layout(text) for text in captions])

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (ENCODER_BATCH,), generator=generator)
        return layout_loss(net, encoder(pixel_values(pictures[chosen])).image_embeds, layouts[chosen])

    net.load_state_dict(train(net, loss_of, ENCODER_SCHEDULE, work / "image_encoder.safetensors"))
    return encoder.eval()


def save_encoder(encoder: CLIPVisionModelWithProjection, out: Path) -> None:
    """Writes the image encoder in float16 and its processor."""
    encoder.half().save_pretrained(out / "image_encoder")
    load_as_float32(out / "image_encoder" / "config.json")
    forget_origin(out / "image_encoder" / "config.json")
    image_processor().save_pretrained(out / "feature_extractor")


def train_ip_adapter(
    pipe: DiffusionPipeline, encoder: CLIPVisionModelWithProjection, checkpoint: Path, out: Path
) -> None:
    """Trains (or goes on with) the image projection and the image's keys and values, and writes them in float16."""
    torch.manual_seed(0)
    data = examples(pipe)
    captions = encoded_captions(pipe, with_other_colours(data.scenes))
    with torch.no_grad():
        embedded = torch.cat([encoder(pixel_values(part)).image_embeds for part in data.pictures.split(500)])
    adapter = add_adapter(pipe, encoder.config.projection_dim)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator, least_timestep: int = 0) -> Tensor:
        batch = draw_batch(data.latents, alphas, generator, DROPPED, least_timestep)
        seen = torch.rand(len(batch.chosen), 1, generator=generator) >= DROPPED_PICTURES
        given = captions(batch.chosen, batch.kept)
        added = given.pop("added_cond_kwargs", {}) | {"image_embeds": [(embedded[batch.chosen] * seen)[:, None]]}
        return batch.error(pipe.unet(batch.sample, batch.timesteps, **given, added_cond_kwargs=added).sample)

    adapter.load_state_dict(train(adapter, loss_of, SCHEDULE, checkpoint))
    refined = checkpoint.with_stem(f"{checkpoint.stem}-refined")
    adapter.load_state_dict(train(adapter, lambda g: loss_of(g, NOISY), REFINEMENT, refined))
    save_file(written(adapter), out, {"format": "pt"})


def add_adapter(pipe: DiffusionPipeline, image_width: int) -> torch.nn.ModuleDict:
    """Puts an adapter on a pipeline that sees an image as another text, and returns its networks."""
    width = pipe.unet.config.cross_attention_dim
    projection = torch.nn.Linear(image_width, IMAGE_TOKENS * width).state_dict(prefix="proj.")
    projection |= torch.nn.LayerNorm(width).state_dict(prefix="norm.")
    weights = pipe.unet.state_dict()
    crossing = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if "attn2" in name]
    own = {
        f"{2 * index + 1}.to_{kind}_ip.weight": weights[f"{name}.to_{kind}.weight"].clone()
        for index, name in enumerate(crossing)
        for kind in "kv"
    }
    state = {"image_proj": projection, "ip_adapter": own}
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    processors = [processor for name, processor in pipe.unet.attn_processors.items() if "attn2" in name]
    adapter = torch.nn.ModuleDict(
        {
            "image_proj": pipe.unet.encoder_hid_proj.image_projection_layers[0],
            "ip_adapter": torch.nn.ModuleList(processors),
        }
    )
    return adapter.requires_grad_()


def written(adapter: torch.nn.ModuleDict) -> dict[str, Tensor]:
    """Names an adapter's weights as they are read: `image_proj.proj.*`, `ip_adapter.1.to_k_ip.weight`, 3, 5, ..."""
    tensors = {}
    for name, tensor in adapter["image_proj"].state_dict().items():
        tensors[f"image_proj.{name.replace('image_embeds', 'proj')}"] = tensor
    for index, processor in enumerate(adapter["ip_adapter"]):
        for kind in "kv":
            tensors[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = getattr(processor, f"to_{kind}_ip")[0].weight
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}


def with_other_colours(scenes: list[Scene]) -> list[Scene]:
    """Gives every second scene colours by chance."""
    rng = np.random.default_rng(23)
    return [with_other_colour(scene, rng) if index % 2 else scene for index, scene in enumerate(scenes)]


def with_other_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    """Draws colours for the objects and the background of a scene."""
    objects = tuple(dataclasses.replace(o, colour=COLOURS[rng.integers(len(COLOURS))]) for o in scene.objects)
    return Scene(objects, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


def judge(pipe: DiffusionPipeline, guidance: float, picture: Path | None, count: int = 30) -> None:
    """Prints how much of the pictures' scenes is drawn, without a prompt and with one that says other colours."""
    prompts = read_prompts(resolve_base("shapes").folder / "prompts" / "held_out.jsonl").first(count).prompts
    texts = [prompt.text for prompt in prompts]
    rng = np.random.default_rng(24)
    sources = np.stack([render(parse(text), rng) for text in texts])
    others = [caption(with_other_colour(parse(text), rng)) for text in texts]
    shown: list[np.ndarray] = []
    for name, given, scale in (
        ("no prompt", [""] * count, 1.0),
        ("other colours", others, 1.0),
        ("other colours, scale 0", others, 0.0),
    ):
        pipe.set_ip_adapter_scale(scale)
        pictures = [
            _draw(pipe, text, source, guidance, seed)
            for seed, (text, source) in enumerate(zip(given, sources, strict=True))
        ]
        found = {
            "drawn with": name,
            "accuracy": round(attribute_accuracy(pictures, texts), 4),
            "accuracy of colours": round(colour_accuracy(pictures, texts), 4),
        }
        print(json.dumps(found), flush=True)
        shown += [row for start in (0, 10) for row in (*sources[start : start + 10], *pictures[start : start + 10])]
    if picture is not None:
        write_grid(shown, picture)


def _draw(pipe: DiffusionPipeline, text: str, source: np.ndarray, guidance: float, seed: int) -> np.ndarray:
    """Draws one picture: a pipeline gives all prompts of a call the same image."""
    drawn = pipe(
        **text_arguments(pipe, [text]),
        ip_adapter_image=Image.fromarray(source),
        num_inference_steps=25,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    return np.rint(drawn * 255).astype(np.uint8)


def colour_accuracy(pictures: list[np.ndarray], texts: list[str]) -> float:
    """Computes the share of the captions' objects' colours that are in the pictures, wherever."""
    found = []
    for picture, text in zip(pictures, texts, strict=True):
        seen = {item.colour for item in read_picture(picture).objects}
        found += [item.colour in seen for item in parse(text).objects]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
