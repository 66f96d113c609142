"""Figures that docs/method.md quotes: where an untrained W8A8 model errs, and how stable its sensitivities are.

    python benchmarks/findings.py WORK_FOLDER [--prompts 64] [--points 512]

Calibrates W8A8 without training, with shortcuts split, split everywhere, and not, into WORK_FOLDER (kept, and used
again), and asks on the same stored points: the squared error of the activations' quantization alone, what is left of it
without one act point, the error of each row, and rank correlations of the sites' sensitivities at other sample sizes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib import FakeQuantDenoiser, QuantizedDenoiser, calibrate, fp_denoiser
from s2p_deploy.calib.dataset.stored_points import draw_points
from s2p_deploy.calib.quantization.sensitivity import site_sensitivities
from s2p_deploy.cli.options import prompts_from_option
from s2p_deploy.families import BasePipeline, apply_transforms, resolve_base
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Mixed, load_recipe
from s2p_deploy.records import CalibratedModel, LatentDataset, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from s2p_deploy.calib.dataset.stored_points import StoredPoints

SPLITS = ("none", "shortcut", "all")
SAMPLES = (32, 128)
READINGS = ("probe", "literal", "quantized")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "findings.json")
    asked = parser.parse_args()
    base = resolve_base("shapes")
    models = {split: calibrated(base, split, asked.prompts, asked.work) for split in SPLITS}
    points = draw_points(LatentDataset.open(models["none"].folder / "dataset"), asked.points, SEED)
    whole = {split: activation_error(base, model, model.plan, points) for split, model in models.items()}
    result = {
        "prompts": asked.prompts,
        "points": asked.points,
        "activation_error_db": {split: round(decibels(points, error.mean()), 2) for split, error in whole.items()},
        "worst_points": shares(base, models["none"], points, float(whole["none"].mean())),
        "rows": row_span(points, whole["shortcut"]),
        "rank_correlation": {how: rank_stability(base, models["none"], how) for how in READINGS},
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def calibrated(base: BasePipeline, split: str, prompts: int, work: Path) -> CalibratedModel:
    """The preset w8a8 on fewer prompts, with its shortcut convolutions split or not."""
    out = work / f"w8a8-{split}"
    overrides: dict[str, Any] = {"transforms": {"split_shortcut": split}, "dataset": {"prompts": prompts}}
    if not out.exists():
        calibrate(base, load_recipe("w8a8", overrides), prompts_from_option("shapes:train"), out)
    return CalibratedModel.open(out)


@torch.no_grad()
def activation_error(
    base: BasePipeline, model: CalibratedModel, plan: PrecisionPlan, points: StoredPoints
) -> np.ndarray:
    """Mean squared error [n] of each output with floating-point weights and the plan's quantized activations."""
    hot = fp_denoiser(base, model.timesteps.steps)
    apply_transforms(hot, model.transforms)
    floating = replace(plan, sites=tuple(replace(site, weights="none") for site in plan.sites))
    columns = [model.scales.points.index(name) for name in floating.point_names()]
    scales = torch.from_numpy(model.scales.scales[:, columns])
    denoiser = FakeQuantDenoiser(QuantizedDenoiser(hot, floating, {}), scales).eval()
    return np.concatenate(list(errors(denoiser, points)))


def errors(denoiser: Callable[..., Tensor], points: StoredPoints) -> Iterable[np.ndarray]:
    for which in points.batches():
        difference = denoiser(*points.inputs(which)) - points.output[which]
        yield difference.square().mean((1, 2, 3)).numpy()


def shares(base: BasePipeline, model: CalibratedModel, points: StoredPoints, whole: float) -> list[dict[str, Any]]:
    """The three act points without which most of the error goes, and the fraction that goes."""
    gone = {
        point.name: 1 - float(activation_error(base, model, without(model.plan, point.name), points).mean()) / whole
        for point in model.plan.act_points
    }
    worst = sorted(gone, key=gone.__getitem__, reverse=True)[:3]
    return [{"point": name, "share": round(gone[name], 3)} for name in worst]


def without(plan: PrecisionPlan, name: str) -> PrecisionPlan:
    """The plan with one act point in floating point."""
    sites = tuple(replace(site, act_point=None) if site.act_point == name else site for site in plan.sites)
    return replace(plan, sites=sites, act_points=tuple(point for point in plan.act_points if point.name != name))


def decibels(points: StoredPoints, error: float) -> float:
    return float(10 * np.log10(points.output.square().mean().item() / error))


def row_span(points: StoredPoints, error: np.ndarray) -> dict[str, float]:
    """Mean error of the rows with most and least, and their ratio."""
    rows = points.row.numpy()
    means = [float(error[rows == row].mean()) for row in np.unique(rows)]
    return {"largest": max(means), "smallest": min(means), "ratio": round(max(means) / min(means), 1)}


def rank_stability(base: BasePipeline, model: CalibratedModel, how: str) -> float:
    """Spearman's correlation between a sensitivity's scores from 32 and from 128 latents."""
    dataset = LatentDataset.open(model.folder / "dataset")
    timesteps, ranks = model.timesteps, []
    for count in SAMPLES:
        mixed = Mixed.model_validate({"sensitivity": how, "latents": count})
        hot = fp_denoiser(base, timesteps.steps)
        scores = site_sensitivities(hot, model.plan, timesteps, dataset, mixed, seed=count, progress=silent)
        ranks.append(np.argsort(np.argsort(list(scores.values()))))
    return round(float(np.corrcoef(ranks)[0, 1]), 3)


if __name__ == "__main__":
    main()
