"""One calibrated model on other schedules: its rows reused and interpolated, and after a short training on fewer steps.

    python benchmarks/reschedule.py CALIB [--pictures 256] [--iterations 150]

The fine-tuned model goes on from CALIB with the pipeline's own scheduler at 25 steps. Simulated in PyTorch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2p_deploy.calib import calibrate, fake_quant_denoiser, fp_denoiser
from s2p_deploy.cli.options import prompts_from_option
from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import BasePipeline, denoiser_of, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.pipeline import Schedule, engine_denoiser
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import CalibratedModel, PromptSet
from s2p_deploy.validation.metrics import psnr_db
from s2p_deploy.validation.numbers import median_of
from s2p_deploy.validation.pictures import draw

STEPS = 25
SCHEDULES = (Schedule(50), Schedule(STEPS), Schedule(10, "unipc"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calib", type=Path)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "reschedule.json")
    asked = parser.parse_args()
    base = resolve_base("shapes")
    model = CalibratedModel.open(asked.calib)
    tuned = fine_tuned(model, base, asked.iterations, asked.calib.with_name(f"{asked.calib.name}-{STEPS}-steps"))
    prompts = prompts_from_option("shapes:held_out").first(asked.pictures)
    models = {"as calibrated": model, "fine-tuned": tuned}
    rows = [row for schedule in SCHEDULES for row in compared(base, prompts, schedule, models)]
    result = {"recipe": model.manifest.recipe["name"], "iterations": asked.iterations, "rows": rows}
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def fine_tuned(model: CalibratedModel, base: BasePipeline, iterations: int, out: Path) -> CalibratedModel:
    """``model`` after a short training on the trajectories of fewer steps."""
    data = model.manifest.recipe | {"sampling": model.manifest.recipe["sampling"] | {"steps": STEPS}}
    data["training"] = data["training"] | {"iterations": iterations}
    return calibrate(
        base, recipe_from_data(data, "fine-tuning"), prompts_from_option("shapes:train"), out, initial=model
    )


def compared(
    base: BasePipeline, prompts: PromptSet, schedule: Schedule, models: dict[str, CalibratedModel]
) -> list[dict[str, Any]]:
    """Median PSNR in dB to the floating-point pictures of the same schedule, for every model."""
    pipe = load_pipeline(base)
    first = next(iter(models.values()))
    guidance = first.manifest.recipe["sampling"]["guidance_scale"]

    def pictures(denoiser: torch.nn.Module) -> np.ndarray:
        stand_in = engine_denoiser(TorchRunner(denoiser), denoiser_of(pipe).config, first.timesteps)
        return draw(with_denoiser(pipe, stand_in), prompts, schedule, guidance).pictures

    reference = pictures(fp_denoiser(base, first.timesteps.steps))
    rows = []
    for name, model in models.items():
        psnr = median_of(psnr_db(reference, pictures(fake_quant_denoiser(model))))
        figures = {"median_psnr": round(psnr.value, 2), "low": round(psnr.low, 2), "high": round(psnr.high, 2)}
        rows.append({"scheduler": schedule.scheduler or "own", "steps": schedule.steps, "model": name} | figures)
    return rows


if __name__ == "__main__":
    main()
