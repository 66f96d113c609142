"""Trains an LCM-LoRA of the bundled pipeline: with it and LCMScheduler, four steps without guidance draw a prompt.

    python examples/shapes/train_lcm_lora.py
    python examples/shapes/train_lcm_lora.py --judge --picture grid.png

The UNet of `sibling_lcm.py`, but as a LoRA (arXiv 2311.05556) of the attention, feed-forward and projection layers, and
with the teacher's guidance in it: no guidance embedding, guidance 1 when it draws. Scenes are so simple that the UNet draws them in four steps of LCMScheduler
without it too (accuracy 0.992 of 100 held-out prompts, 0.993 with it); what it adds is that a single step comes nearer to
what the teacher makes of the same noise (10.1 levels of root mean square error, 10.8 without it; 8 pictures).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from adapter_training import ASSETS, BATCH, frozen_pipeline
from diffusers import LCMScheduler
from evaluate import draw, write_grid
from scenes import training_captions
from sibling_lcm import MAX_WEIGHT, STEPS, TRAJECTORIES, teacher_trajectories
from text_encoders import encode_captions
from train_lora import ATTENTION, FEED_FORWARD, PROJECTIONS, add_lora, save_lora
from training import Schedule, train

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.records import read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

OUT = ASSETS / "loras" / "lcm.safetensors"
RANK = 32
SCHEDULE = Schedule(iterations=400, peak=2e-3, warmup=50, ema=0.98, save_every=100)
FEW_STEPS = 4


def main() -> None:
    """Trains the LoRA, or judges it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=Path("build/lora"), help="folder of the checkpoint")
    parser.add_argument("--judge", action="store_true", help="train nothing, draw 100 held-out prompts")
    parser.add_argument("--picture", type=Path, help="a grid of what is drawn without the LoRA, and with it")
    options = parser.parse_args()
    base = resolve_base("shapes")
    if not options.judge:
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        distil(frozen_pipeline("sd1"), base.default_guidance, options.work / "lcm.safetensors", options.out)
    judge(load_pipeline(base), options.out, options.picture)


def distil(pipe: DiffusionPipeline, guidance: float, checkpoint: Path, out: Path) -> None:
    """Trains (or goes on with) the LoRA on the teacher's trajectories and writes it."""
    torch.manual_seed(0)
    text, empty = encode_captions(pipe, training_captions(TRAJECTORIES))
    walked = teacher_trajectories(pipe, text, empty, (guidance, guidance))
    parts = add_lora(pipe, RANK, unet=ATTENTION + FEED_FORWARD + PROJECTIONS)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(TRAJECTORIES, (BATCH,), generator=generator)
        call = torch.randint(STEPS, (BATCH,), generator=generator)
        noisy, timesteps = walked.points[call, chosen], walked.timesteps[call]
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        target = (noisy - alpha.sqrt() * walked.last[chosen]) / (1 - alpha).sqrt()
        predicted = pipe.unet(
            noisy.to(memory_format=torch.channels_last), timesteps, text.states[chosen].float()
        ).sample
        return ((1 / alpha).clamp(max=MAX_WEIGHT) * (predicted - target) ** 2).mean()

    parts.load_state_dict(train(parts, loss_of, SCHEDULE, checkpoint))
    save_lora(pipe, parts, out)


def judge(pipe: DiffusionPipeline, file: Path, picture: Path | None) -> None:
    """Prints how many attributes are right after few steps, without the LoRA and with it."""
    prompts = read_prompts(resolve_base("shapes").folder / "prompts" / "held_out.jsonl").first(100).prompts
    texts = [prompt.text for prompt in prompts]
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    shown = []
    for name in ("without", "with"):
        if name == "with":
            pipe.load_lora_weights(str(file))
        drawn = draw(pipe, prompts, FEW_STEPS, 1.0)
        shown += drawn[:20]
        print(json.dumps({"LoRA": name, "steps": FEW_STEPS, "accuracy": round(attribute_accuracy(drawn, texts), 4)}))
    if picture is not None:
        write_grid(shown, picture)


if __name__ == "__main__":
    main()
