"""Trains the bundled ``shapes`` pipeline, or one of its siblings, and writes it in diffusers format.

    python examples/shapes --work build/shapes --out s2p_deploy/shapes/pipeline
    python examples/shapes --kind sdxl --work build/siblings --out tests/assets/pipelines/shapes-sdxl

A sibling takes autoencoder, tokenizer and text encoder from the bundled pipeline; a fine-tuned one all but its denoiser
from the pipeline that it starts from, by links. Fixed seeds; killed at any time, a second start goes on where it was.
Times are in docs/shapes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from autoencoder import train_vae
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from saved_configs import forget_origin, load_as_float32
from siblings import SIBLINGS, train_sibling
from text_encoders import train_text
from train_classifier import train_classifier
from train_unet import new_scheduler, train_unet

from s2p_deploy.shapes.scenes import distinct_captions

TRAIN_PROMPTS, HELD_OUT_PROMPTS = 1_000, 512
GUIDANCE_SCALE = 2.0  # what the pipeline is meant to be sampled with; docs/shapes.md compares others
BUNDLED = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))
ASSETS = Path(__file__).parents[2] / "tests" / "assets" / "pipelines"
INDEX = "model_index.json"


def main() -> None:
    """Trains the pipeline that was asked for and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sd1", *SIBLINGS), default="sd1")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument(
        "--snapshot", action="store_true", help="of a sibling: write its last checkpoint, train nothing"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.kind == "sd1":
        train_bundled(options.work, options.out)
        return
    sibling = SIBLINGS[options.kind]
    base = BUNDLED if sibling.base is None else ASSETS / f"shapes-{sibling.base}"
    # told so, diffusers does without what the folder does not have
    absent = {name: None for name, entry in json.loads((base / INDEX).read_text()).items() if entry == [None, None]}
    start = DiffusionPipeline.from_pretrained(base, **absent)
    pipeline = train_sibling(options.kind, options.work, start, snapshot=options.snapshot)
    save_pipeline(pipeline, options.out, sibling.guidance_scale)
    share(options.out, base)


def train_bundled(work: Path, out: Path) -> None:
    """Trains every part of the SD1 kind in turn and assembles the pipeline, with its classifier and prompts."""
    vae = train_vae(work)
    tokenizer, text_encoder = train_text(work)
    classifier = train_classifier(work)
    unet = train_unet(work, vae, tokenizer, text_encoder)
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
    save_pipeline(pipeline, out, GUIDANCE_SCALE)
    save_file({k: v.contiguous() for k, v in classifier.half().state_dict().items()}, out / "classifier.safetensors")
    write_prompts(out / "prompts")


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, guidance_scale: float) -> None:
    """Writes a pipeline with float16 weights and how it is meant to be sampled, in place of what ``folder`` held."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("text_encoder*/config.json"):
        load_as_float32(config)
    for config in partial.glob("*/config.json"):
        forget_origin(config)
    (partial / "sampling.json").write_text(json.dumps({"guidance_scale": guidance_scale}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def share(folder: Path, base: Path) -> None:
    """Replaces components that are another pipeline's by relative links: tokenizers, and those whose files are equal."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        pairs = [(file, base / part.name / file.name) for file in part.iterdir()]
        if part.name.startswith("tokenizer") or all(
            theirs.is_file() and theirs.read_bytes() == file.read_bytes() for file, theirs in pairs
        ):
            shutil.rmtree(part)
            part.symlink_to(os.path.relpath(base / part.name, folder))


def write_prompts(folder: Path) -> None:
    """Writes the train and held-out prompt files (JSON lines)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, TRAIN_PROMPTS), ("held_out", True, HELD_OUT_PROMPTS)):
        captions = distinct_captions(np.random.default_rng(10 + held_out), held_out=held_out)
        lines = [json.dumps({"id": f"{name}-{index:04d}", "text": next(captions)}) for index in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
