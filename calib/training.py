"""S2P training: batches mix prompts and timesteps, and learn from stored teacher outputs.

Each iteration's draw is seeded by its number and all state is in one file, so a killed run continues bit for bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from s2p_deploy.calib.atomic import write_text
from s2p_deploy.calib.training_state import load_state, save_state
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Training
    from s2p_deploy.records import LatentDataset

CLIP_NORM = 1.0
ERROR_BATCH = 64
_CHECKPOINT = "training.safetensors"
LOG = "training.jsonl"


@dataclass(frozen=True)
class Batch:
    """Samples float32 [b, C, H, W] on their rows, their text states and what the teacher answered.

    ``row`` int64 [b] is the timestep, ``index`` int64 [b] the row's place among the calibrated ones.
    """

    sample: Tensor
    row: Tensor
    index: Tensor
    texts: Tensor
    target: Tensor


def train(state: TrainingState, dataset: LatentDataset, training: Training, work: Path, progress: Progress) -> None:
    """Trains ``state`` in place for ``training.iterations``, from the checkpoint in ``work`` where there is one.

    Raises:
        S2PError: the loss is no finite number any more.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / _CHECKPOINT
    if checkpoint.exists():
        load_state(state, checkpoint)
    else:
        state.row_error.copy_(row_errors(state, dataset, progress, "starting error"))
        save_state(state, checkpoint)
    progress("training", state.iteration, training.iterations)
    while state.iteration < training.iterations:
        batch = draw_batch(dataset, state.rows, training, state.iteration)
        loss = _iterate(state, batch, training)
        if not math.isfinite(loss):
            raise S2PError(
                f"training loss became {loss} at iteration {state.iteration}: lower the recipe's training rates"
            )
        state.losses.append(loss)
        if state.iteration % training.save_every == 0 or state.iteration == training.iterations:
            save_state(state, checkpoint)
        progress("training", state.iteration, training.iterations)
    write_text(work / LOG, _log(state.losses, training))


def draw_batch(dataset: LatentDataset, rows: Tensor, training: Training, iteration: int) -> Batch:
    """The batch of one iteration: stored points drawn over all prompts and rows, each as one CFG branch."""
    generator = np.random.default_rng((training.seed, iteration))
    points = generator.integers(len(dataset.rows), size=training.batch)
    uncond = generator.random(training.batch) < training.empty_prompt_share
    return take(dataset, rows, points, uncond)


def take(dataset: LatentDataset, rows: Tensor, points: NDArray[np.int64], uncond: NDArray[np.bool_]) -> Batch:
    """Stored points int64 [b], each as the branch that ``uncond`` bool [b] names."""
    prompt = dataset.prompt[points]
    texts = dataset.texts[np.where(uncond, dataset.uncond_text[prompt], dataset.cond_text[prompt])]
    target = np.where(uncond[:, None, None, None], dataset.uncond[points], dataset.cond[points])
    row = torch.from_numpy(dataset.rows[points])
    return Batch(
        sample=torch.from_numpy(dataset.latents[points]).float(),
        row=row,
        index=torch.searchsorted(rows, row),
        texts=torch.from_numpy(texts),
        target=torch.from_numpy(target).float(),
    )


@torch.no_grad()
def row_errors(state: TrainingState, dataset: LatentDataset, progress: Progress, stage: str) -> Tensor:
    """Mean squared error float32 [calibrated rows] of the model as it is, over every stored point and both branches."""
    points = np.arange(len(dataset.rows))
    total = torch.zeros(len(state.rows), dtype=torch.float64)
    count = torch.zeros_like(total)
    for start in range(0, len(points), ERROR_BATCH):
        chunk = points[start : start + ERROR_BATCH]
        for branch in (False, True):
            batch = take(dataset, state.rows, chunk, np.full(len(chunk), branch))
            errors = _sample_errors(state, batch)
            total.index_add_(0, batch.index, errors.double())
            count.index_add_(0, batch.index, torch.ones_like(errors, dtype=torch.float64))
        progress(stage, min(start + ERROR_BATCH, len(points)), len(points))
    return (total / count).clamp_min(torch.finfo(torch.float32).tiny).float()


def cosine(iteration: int, iterations: int) -> float:
    """Factor of every rate: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def _iterate(state: TrainingState, batch: Batch, training: Training) -> float:
    """One update; returns the loss before it. A loss that is not finite leaves the state as it was."""
    for parameter in state.trained.parameters():
        parameter.grad = None
    errors = _sample_errors(state, batch)
    if training.loss == "row_balanced":
        errors = errors / state.row_error[batch.index]
    loss = errors.mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    loss.backward()
    nn.utils.clip_grad_norm_(state.trained.parameters(), CLIP_NORM)
    state.update(batch.index.unique(), cosine(state.iteration, training.iterations))
    return value


def _sample_errors(state: TrainingState, batch: Batch) -> Tensor:
    scales = state.act_scales(batch.index)
    output = state.denoiser.with_sample_scales(batch.sample, batch.row, batch.texts, scales)
    return (output - batch.target).square().mean((1, 2, 3))


def _log(losses: list[float], training: Training) -> str:
    lines = []
    for iteration, loss in enumerate(losses):
        factor = cosine(iteration, training.iterations)
        rates = {
            name: factor * getattr(training, name) for name in ("weight_rate", "weight_scale_rate", "act_scale_rate")
        }
        lines.append(json.dumps({"iteration": iteration, "loss": loss, **rates}) + "\n")
    return "".join(lines)
