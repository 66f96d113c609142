"""Figures that docs/recipes.md quotes: where an untrained W8A8 model errs, and how stable its sensitivities are.

    python -m s2p_research.findings WORK_FOLDER [--prompts 64] [--points 512]

Calibrates W8A8 without training, with shortcuts split, split everywhere, and not, into WORK_FOLDER (kept, and used
again), and measures on the same samples: the squared error of the activations' quantization alone, what is left of it
without one activation quantizer, the error at each timestep, and rank correlations of the layers' sensitivities at
other sample sizes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import FakeQuantDenoiser, QuantizedDenoiser, calibrate, fp_denoiser
from s2p_deploy.calib.samples import draw_samples
from s2p_deploy.calib.sensitivity import layer_sensitivities
from s2p_deploy.context import silent
from s2p_deploy.families import BasePipeline, apply_transforms, resolve_base
from s2p_deploy.recipe import Mixed, Recipe
from s2p_deploy.records import CalibratedModel, LatentDataset, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from s2p_deploy.calib.samples import SamplePairs

SPLITS = ("none", "shortcut", "all")
SAMPLES = (32, 128)
READINGS = ("fisher", "literal", "quantized")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("research/results") / "findings.json")
    options = parser.parse_args()
    base = resolve_base("shapes")
    models = {split: calibrated(base, split, options.prompts, options.work) for split in SPLITS}
    points = draw_samples(LatentDataset.open(models["none"].folder / "dataset"), options.points, SEED)
    whole = {split: activation_error(base, model, model.plan, points) for split, model in models.items()}
    result = {
        "prompts": options.prompts,
        "points": options.points,
        "activation_error_db": {split: round(decibels(points, error.mean()), 2) for split, error in whole.items()},
        "worst_points": shares(base, models["none"], points, float(whole["none"].mean())),
        "rows": row_span(points, whole["shortcut"]),
        "rank_correlation": {how: rank_stability(base, models["none"], how) for how in READINGS},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def calibrated(base: BasePipeline, split: str, prompts: int, work: Path) -> CalibratedModel:
    """Calibrates the preset w8a8 on fewer prompts, with its shortcut convolutions split or not."""
    out = work / f"w8a8-{split}"
    overrides: dict[str, Any] = {"transforms": {"split_shortcut": split}, "dataset": {"prompts": prompts}}
    if not out.exists():
        calibrate(base, Recipe.load("w8a8", overrides), as_prompts("shapes:train"), out)
    return CalibratedModel.open(out)


@torch.no_grad()
def activation_error(
    base: BasePipeline, model: CalibratedModel, plan: PrecisionPlan, points: SamplePairs
) -> np.ndarray:
    """Measures the mean squared error [n] of outputs with floating-point weights and quantized activations."""
    float_denoiser = fp_denoiser(base, model.timesteps.steps)
    apply_transforms(float_denoiser, model.transforms)
    floating = replace(plan, layers=tuple(replace(layer, weights="none") for layer in plan.layers))
    columns = [model.scales.quantizers.index(name) for name in floating.quantizer_names()]
    scales = torch.from_numpy(model.scales.scales[:, columns])
    denoiser = FakeQuantDenoiser(QuantizedDenoiser(float_denoiser, floating, {}), scales).eval()
    return np.concatenate(list(errors(denoiser, points)))


def errors(denoiser: Callable[..., Tensor], points: SamplePairs) -> Iterable[np.ndarray]:
    for which in points.batches():
        difference = denoiser(*points.inputs(which)) - points.output[which]
        yield difference.square().mean((1, 2, 3)).numpy()


def shares(base: BasePipeline, model: CalibratedModel, points: SamplePairs, whole: float) -> list[dict[str, Any]]:
    """Finds the three activation quantizers without which most of the error goes, and the fraction that goes."""
    gone = {
        point.name: 1 - float(activation_error(base, model, without(model.plan, point.name), points).mean()) / whole
        for point in model.plan.activation_quantizers
    }
    worst = sorted(gone, key=gone.__getitem__, reverse=True)[:3]
    return [{"point": name, "share": round(gone[name], 3)} for name in worst]


def without(plan: PrecisionPlan, name: str) -> PrecisionPlan:
    """Returns the plan with one activation quantizer in floating point."""
    layers = tuple(
        replace(layer, activation_quantizer=None) if layer.activation_quantizer == name else layer
        for layer in plan.layers
    )
    return replace(
        plan,
        layers=layers,
        activation_quantizers=tuple(point for point in plan.activation_quantizers if point.name != name),
    )


def decibels(points: SamplePairs, error: float) -> float:
    return float(10 * np.log10(points.output.square().mean().item() / error))


def row_span(points: SamplePairs, error: np.ndarray) -> dict[str, float]:
    """Measures the mean error at the timesteps with most and least, and their ratio."""
    rows = points.timestep_index.numpy()
    means = [float(error[rows == row].mean()) for row in np.unique(rows)]
    return {"largest": max(means), "smallest": min(means), "ratio": round(max(means) / min(means), 1)}


def rank_stability(base: BasePipeline, model: CalibratedModel, how: str) -> float:
    """Computes Spearman's correlation between a sensitivity's scores from 32 and from 128 latents."""
    dataset = LatentDataset.open(model.folder / "dataset")
    timesteps, ranks = model.timesteps, []
    for count in SAMPLES:
        mixed = Mixed.model_validate({"sensitivity": how, "latents": count})
        float_denoiser = fp_denoiser(base, timesteps.steps)
        scores = layer_sensitivities(float_denoiser, model.plan, timesteps, dataset, mixed, seed=count, progress=silent)
        ranks.append(np.argsort(np.argsort(list(scores.values()))))
    correlation: np.ndarray = np.asarray(np.corrcoef(ranks))
    return round(float(correlation[0, 1]), 3)


if __name__ == "__main__":
    main()
