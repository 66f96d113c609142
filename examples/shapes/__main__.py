"""Trains the bundled ``shapes`` pipeline and writes it in diffusers format.

    python examples/shapes --work build/shapes --out s2p_deploy/shapes/pipeline

Fixed seeds; killed at any time, a second start goes on where it was. Times are in docs/shapes.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from train_classifier import train_classifier
from train_text import train_text
from train_unet import new_scheduler, train_unet
from train_vae import train_vae

from s2p_deploy.shapes.grammar import distinct_captions

TRAIN_PROMPTS, HELD_OUT_PROMPTS = 1_000, 512
GUIDANCE_SCALE = 2.0  # what the pipeline is meant to be sampled with; docs/shapes.md compares others


def main() -> None:
    """Trains every part in turn and assembles the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    vae = train_vae(options.work)
    tokenizer, text_encoder = train_text(options.work)
    classifier = train_classifier(options.work)
    unet = train_unet(options.work, vae, tokenizer, text_encoder)

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(options.out, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(options.out, safe_serialization=True)
    save_file(
        {k: v.contiguous() for k, v in classifier.half().state_dict().items()}, options.out / "classifier.safetensors"
    )
    load_as_float32(options.out / "text_encoder" / "config.json")
    (options.out / "sampling.json").write_text(json.dumps({"guidance_scale": GUIDANCE_SCALE}) + "\n")
    write_prompts(options.out / "prompts")


def load_as_float32(config: Path) -> None:
    """Transformers loads in the type that a configuration names, diffusers in float32: a pipeline needs one type."""
    data = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(data, indent=2) + "\n")


def write_prompts(folder: Path) -> None:
    """Writes the train and held-out prompt files (JSON lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, TRAIN_PROMPTS), ("held_out", True, HELD_OUT_PROMPTS)):
        captions = distinct_captions(np.random.default_rng(10 + held_out), held_out=held_out)
        lines = [json.dumps({"id": f"{name}-{index:04d}", "text": next(captions)}) for index in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
