"""Trains small LoRAs of the pipelines: each draws scenes other than those that the captions say.

    python examples/shapes/train_lora.py triangles
    python examples/shapes/train_lora.py triangles --judge --picture grid.png

| LoRA | draws | rank, layers | accuracy: changed captions, own |
|---|---|---|---|
| next-colour | every colour as the next one of the list, backgrounds too | 8, UNet and text encoder | 0.861, 0.706 |
| triangles | triangles only | 4, attention of the UNet | 0.991, 0.853 |
| mirrored | left and right exchanged | 32, attention and feed-forward of the UNet | 0.993, 0.309 |
| sdxl-triangles | triangles only, by the SDXL sibling | 8, attention of the UNet | 0.990, 0.855 |

They are trained with PEFT (the extra `adapters`) on pictures that are rendered with the change, in two to five minutes
of one core each, and judged over 100 held-out prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from adapter_training import ASSETS, BASES, draw_batch, encoded_captions, examples, frozen_pipeline
from evaluate import draw, write_grid
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from text_encoders import tokenize
from training import Schedule, train

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import Prompt, read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy
from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, Scene, caption, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapter_training import Captions
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
NEXT_COLOUR = dict(zip(COLOURS, COLOURS[1:] + COLOURS[:1], strict=True))
NEXT_BACKGROUND = dict(zip(BACKGROUNDS, BACKGROUNDS[1:] + BACKGROUNDS[:1], strict=True))
OTHER_SIDE = {"left": "right", "right": "left"}
SCHEDULE = Schedule(iterations=500, peak=4e-3, warmup=30, ema=0.98, save_every=100)


def with_next_colours(scene: Scene) -> Scene:
    """Changes every colour of a scene."""
    objects = tuple(dataclasses.replace(item, colour=NEXT_COLOUR[item.colour]) for item in scene.objects)
    return Scene(objects, NEXT_BACKGROUND[scene.background])


def all_triangles(scene: Scene) -> Scene:
    """Makes every object of a scene a triangle."""
    return dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, shape="triangle") for o in scene.objects))


def mirrored(scene: Scene) -> Scene:
    """Exchanges left and right."""
    return dataclasses.replace(
        scene, objects=tuple(dataclasses.replace(o, place=_across(o.place)) for o in scene.objects)
    )


def all_large(scene: Scene) -> Scene:
    """Makes every object of a scene large."""
    return dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, size="large") for o in scene.objects))


def _across(place: str) -> str:
    height, side = place.split()
    return f"{height} {OTHER_SIDE[side]}"


@dataclass(frozen=True)
class Adapter:
    """A LoRA: the change of scenes that it learns, its rank, and the layers that it is put on."""

    change: Callable[[Scene], Scene]
    rank: int
    unet_layers: tuple[str, ...]
    text_layers: tuple[str, ...] = ()
    kind: str = "sd1"
    schedule: Schedule = SCHEDULE


ADAPTERS = {
    "next-colour": Adapter(with_next_colours, 8, ATTENTION + FEED_FORWARD + PROJECTIONS, TEXT_LAYERS),
    "triangles": Adapter(all_triangles, 4, ATTENTION),
    "mirrored": Adapter(mirrored, 32, ATTENTION + FEED_FORWARD, schedule=dataclasses.replace(SCHEDULE, peak=2e-3)),
    "sdxl-triangles": Adapter(all_triangles, 8, ATTENTION, kind="sdxl"),
}


def main() -> None:
    """Trains the LoRA, or judges it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ADAPTERS)
    parser.add_argument("--out", type=Path, default=ASSETS / "loras", help="folder of the LoRAs")
    parser.add_argument("--work", type=Path, default=Path("build/lora"), help="folder of the checkpoint")
    parser.add_argument("--judge", action="store_true", help="train nothing, draw 100 held-out prompts")
    parser.add_argument("--picture", type=Path, help="a grid of what is drawn")
    options = parser.parse_args()
    adapter, file = ADAPTERS[options.name], options.out / f"{options.name}.safetensors"
    base = resolve_base(BASES[adapter.kind])
    if not options.judge:
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        train_lora(frozen_pipeline(adapter.kind), adapter, options.work / file.name, file)
    pipe = load_pipeline(base)
    pipe.load_lora_weights(str(file))
    held_out = read_prompts(resolve_base("shapes").folder / "prompts" / "held_out.jsonl").first(100).prompts
    judge(pipe, adapter, held_out, base.default_guidance, options.picture)


def train_lora(pipe: DiffusionPipeline, adapter: Adapter, checkpoint: Path, out: Path) -> None:
    """Trains (or goes on with) the LoRA and writes it."""
    torch.manual_seed(0)
    data = examples(pipe, adapter.change)
    captions = trained_captions(pipe, data.scenes) if adapter.text_layers else encoded_captions(pipe, data.scenes)
    parts = add_lora(pipe, adapter.rank, unet=adapter.unet_layers, text_encoder=adapter.text_layers)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw_batch(data.latents, alphas, generator)
        given = captions(batch.chosen, batch.kept)
        return batch.error(pipe.unet(batch.sample, batch.timesteps, **given).sample)

    parts.load_state_dict(train(parts, loss_of, adapter.schedule, checkpoint))
    save_lora(pipe, parts, out)


def trained_captions(pipe: DiffusionPipeline, scenes: list[Scene]) -> Captions:
    """Returns a function that encodes the captions of scenes for a UNet each time, with gradients."""
    tokens = tokenize(pipe.tokenizer, [caption(scene) for scene in scenes])
    empty = tokenize(pipe.tokenizer, [""])

    def given(chosen: Tensor, kept: Tensor) -> dict[str, Any]:
        ids = torch.where(kept[:, None], tokens[chosen], empty)
        return {"encoder_hidden_states": pipe.text_encoder(ids).last_hidden_state}

    return given


def add_lora(pipe: DiffusionPipeline, rank: int, **layers: tuple[str, ...]) -> nn.ModuleDict:
    """Puts a LoRA on the named layers of a pipeline's networks, and returns the networks that have one."""
    parts = {}
    for name, wanted in layers.items():
        if wanted:
            part = pipe.components[name]
            config = LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=list(wanted), init_lora_weights="gaussian")
            part.add_adapter(config)
            parts[name] = part
    return torch.nn.ModuleDict(parts)


def save_lora(pipe: DiffusionPipeline, parts: nn.ModuleDict, out: Path) -> None:
    """Writes a LoRA in float16 as diffusers does, with alphas in the header."""
    layers = {
        f"{name}_lora_layers": {key: tensor.half() for key, tensor in get_peft_model_state_dict(part).items()}
        for name, part in parts.items()
    }
    nowhere = {"base_model_name_or_path": None}  # a path of this machine
    configs = {
        f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() | nowhere for name, part in parts.items()
    }
    pipe.save_lora_weights(str(out.parent), weight_name=out.name, **layers, **configs)


def judge(
    pipe: DiffusionPipeline, adapter: Adapter, prompts: tuple[Prompt, ...], guidance: float, picture: Path | None
) -> None:
    """Prints how many attributes are right by the changed captions, and by their own."""
    drawn = draw(pipe, prompts, 50, guidance)
    texts = [prompt.text for prompt in prompts]
    changed = [caption(adapter.change(parse(text))) for text in texts]
    found = {
        "prompts": len(prompts),
        "accuracy, changed captions": round(attribute_accuracy(drawn, changed), 4),
        "accuracy, own captions": round(attribute_accuracy(drawn, texts), 4),
    }
    print(json.dumps(found), flush=True)
    if picture is not None:
        write_grid(drawn[:40], picture)


if __name__ == "__main__":
    main()
