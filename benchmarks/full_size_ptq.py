"""Recipe ``ptq`` at Stable Diffusion v1-4's size, random weights: time, peak memory and size of what it writes.

Run as ``python benchmarks/full_size_ptq.py [--work build/full_size] [--steps 4] [--recipe ptq]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from s2p_deploy.calib import calibrate
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import load_recipe
from s2p_deploy.records import Prompt, PromptSet

SD_V1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recipe", default="ptq")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "full_size_ptq.json")
    asked = parser.parse_args()
    pipeline, calibrated = asked.work / "pipeline", asked.work / "calib"
    if not pipeline.exists():
        write_pipeline(pipeline)
    before = peak_gb()
    recipe = load_recipe(asked.recipe, {"sampling": {"steps": asked.steps}, "dataset": {"prompts": 1, "width": 1}})
    start = time.perf_counter()
    made = calibrate(
        resolve_base(str(pipeline)), recipe, PromptSet((Prompt("p", "a red circle"),)), calibrated, replace=True
    )
    result = {
        "recipe": asked.recipe,
        "steps": asked.steps,
        "prompts": 1,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(peak_gb(), 2),
        "peak_memory_before_gb": round(before, 2),
        "unet_gb": gigabytes(pipeline / "unet"),
        "calibrated_model_gb": gigabytes(made.folder),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def write_pipeline(folder: Path) -> None:
    """The bundled pipeline with a UNet of SD v1-4's configuration and a text encoder of its width."""
    shutil.copytree(
        resolve_base("shapes").folder, folder, ignore=shutil.ignore_patterns("unet", "text_encoder", "classifier*")
    )
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(**SD_V1).save_pretrained(folder / "unet")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gigabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)


if __name__ == "__main__":
    main()
