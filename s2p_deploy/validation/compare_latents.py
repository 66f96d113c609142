"""One call at a time on held-out latents, teacher-forced: how far a denoiser is from floating point on every row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib import fp_denoiser, generate_dataset
from s2p_deploy.calib.dataset.stored_points import points_at
from s2p_deploy.families import load_pipeline
from s2p_deploy.progress import silent
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import LatentDataset, RowSqnr
from s2p_deploy.validation.metrics import pooled_sqnrs_db
from s2p_deploy.validation.numbers import picks, resampled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import PromptSet

_POINTS_PER_CALL = 16
_ELEMENTS_PER_CALL = 2**14  # of latents: one of 64x64
_ALL_CALLS = 2000  # no schedule has more


def make_latents(
    base: BasePipeline, prompts: PromptSet, sampling: Sampling, out: Path, progress: Progress
) -> LatentDataset:
    """All points of the prompts' floating-point trajectories; opened where they stand at ``out``."""
    data = {
        "name": "held-out latents",
        "weights": "none",
        "activations": "none",
        "sampling": sampling.model_dump(mode="json"),
        "dataset": {"prompts": len(prompts.prompts), "points_per_prompt": _ALL_CALLS},
        "training": {"iterations": 0},
    }
    if out.exists():
        return LatentDataset.open(out)
    recipe = recipe_from_data(data, "held-out latents")

    def told(_stage: str, done: int, total: int) -> None:
        progress("held-out latents", done, total)

    pipe, teacher = load_pipeline(base), fp_denoiser(base, sampling.steps)
    return generate_dataset(pipe, teacher, base.base, prompts, recipe, out=out, progress=told)


def sqnr_per_row(denoiser: Callable[..., torch.Tensor], dataset: LatentDataset, progress: Progress = silent) -> RowSqnr:
    """SQNR of a denoiser's answers at every stored point, pooled per row over prompts and both branches.

    The stored answers are float16: nothing above some 70 dB can be told apart.

    Args:
        denoiser: takes what a hot denoiser takes.
        dataset: stored points, every prompt with every call.
        progress: told after every batch.
    """
    rows, column = np.unique(dataset.rows, return_inverse=True)
    signal, noise = np.zeros((2, len(dataset.cond_text), len(rows)))
    size = max(1, min(_POINTS_PER_CALL, _ELEMENTS_PER_CALL // dataset.latents[0].size))
    for start in range(0, len(dataset.rows), size):
        some = np.arange(start, min(start + size, len(dataset.rows)))
        of_signal, of_noise = _powers(denoiser, dataset, some)
        place = dataset.prompt[some], column[some]
        np.add.at(signal, place, of_signal)
        np.add.at(noise, place, of_noise)
        progress("SQNR", int(some[-1]) + 1, len(dataset.rows))
    prompts = len(signal)
    times = np.stack([np.bincount(chosen, minlength=prompts) for chosen in picks(prompts)]).astype(np.float64)
    means = pooled_sqnrs_db(times @ signal, times @ noise).mean(1)
    db = pooled_sqnrs_db(signal.sum(0), noise.sum(0))
    mean = resampled(float(db.mean()), prompts, means)
    return RowSqnr(rows=tuple(rows.tolist()), db=tuple(db.tolist()), mean=mean)


def _powers(
    denoiser: Callable[..., torch.Tensor], dataset: LatentDataset, some: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energy of the stored answers and of the denoiser's error, float64 [points], both branches together."""
    points = points_at(dataset, some)
    with torch.no_grad():
        answer = denoiser(*points.inputs(torch.arange(len(points.row))))
    expected = points.output.double().numpy()
    return _energy(expected), _energy(answer.numpy() - expected)


def _energy(both: NDArray[np.float64]) -> NDArray[np.float64]:
    energy: NDArray[np.float64] = np.square(both).reshape(2, len(both) // 2, -1).sum((0, 2))
    return energy
