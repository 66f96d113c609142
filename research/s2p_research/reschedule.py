"""Calibrated models on other schedules: scales reused and interpolated, and after a short training on fewer steps.

    python -m s2p_research.reschedule CALIB... [--pictures 256] [--iterations 150]

A fine-tuned model goes on from CALIB with the pipeline's own scheduler at 25 steps. Simulated in PyTorch. Rows of
recipes that --out already holds are replaced, others kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import calibrate, fake_quant_denoiser, fp_denoiser
from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import BasePipeline, denoiser_of, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.metrics import median_of, psnr_db
from s2p_deploy.pipeline import Schedule, engine_denoiser
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import CalibratedModel, PromptSet
from s2p_deploy.validation.pictures import generate_pictures

STEPS = 25
SCHEDULES = (Schedule(50), Schedule(STEPS), Schedule(10, "unipc"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calib", type=Path, nargs="+")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--dataset", type=Path, help="folder of the 25-step dataset, made there and shared")
    parser.add_argument("--out", type=Path, default=Path("research/results") / "reschedule.json")
    options = parser.parse_args()
    base = resolve_base("shapes")
    given = [CalibratedModel.open(folder) for folder in options.calib]
    models = {(str(model.manifest.recipe["name"]), False): model for model in given}
    for folder, model in zip(options.calib, given, strict=True):
        out = folder.with_name(f"{folder.name}-{STEPS}-steps")
        models[model.manifest.recipe["name"], True] = fine_tuned(model, base, options.iterations, out, options.dataset)
    prompts = as_prompts("shapes:held_out").first(options.pictures)
    rows = [row for schedule in SCHEDULES for row in compared(base, prompts, schedule, models)]
    write(options.out, rows, {"pictures": options.pictures, "iterations": options.iterations})


def write(out: Path, rows: list[dict[str, Any]], setting: dict[str, int]) -> None:
    """Writes the rows beside those of other recipes in ``out``, measured in the same setting."""
    kept: dict[str, Any] = (
        json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"kind": "Reschedule"} | setting | {"rows": []}
    )
    if {name: kept.get(name) for name in setting} != setting:
        raise SystemExit(f"{out} was measured with another number of pictures or iterations: choose another --out")
    recipes = {row["recipe"] for row in rows}
    result = kept | {"rows": [row for row in kept["rows"] if row["recipe"] not in recipes] + rows}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def fine_tuned(
    model: CalibratedModel, base: BasePipeline, iterations: int, out: Path, dataset: Path | None
) -> CalibratedModel:
    """Calibrates ``model`` further by a short training on the trajectories of fewer steps."""
    data = model.manifest.recipe | {"sampling": model.manifest.recipe["sampling"] | {"steps": STEPS}}
    data["training"] = data["training"] | {"iterations": iterations}
    recipe, prompts = recipe_from_data(data, "fine-tuning"), as_prompts("shapes:train")
    return calibrate(base, recipe, prompts, out, initial=model, dataset=dataset, replace=True)


def compared(
    base: BasePipeline, prompts: PromptSet, schedule: Schedule, models: dict[tuple[str, bool], CalibratedModel]
) -> list[dict[str, Any]]:
    """Measures the median PSNR in dB to the floating-point pictures of the same schedule, for every model."""
    pipe = load_pipeline(base)
    first = next(iter(models.values()))
    guidance = first.manifest.recipe["sampling"]["guidance_scale"]

    def pictures(denoiser: torch.nn.Module) -> np.ndarray:
        stand_in = engine_denoiser(TorchRunner(denoiser), denoiser_of(pipe).config, first.timesteps)
        return generate_pictures(with_denoiser(pipe, stand_in), prompts, schedule, guidance).pictures

    reference = pictures(fp_denoiser(base, first.timesteps.steps))
    rows = []
    for (recipe, tuned), model in models.items():
        psnr = median_of(psnr_db(reference, pictures(fake_quant_denoiser(model))))
        assert psnr.low is not None  # a median has its interval
        assert psnr.high is not None
        figures = {"median_psnr": round(psnr.value, 2), "low": round(psnr.low, 2), "high": round(psnr.high, 2)}
        of = {"recipe": recipe, "fine_tuned": tuned, "scheduler": schedule.scheduler or "own", "steps": schedule.steps}
        rows.append(of | figures)
    return rows


if __name__ == "__main__":
    main()
