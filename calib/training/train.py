"""S2P training: batches mix prompts and timesteps, and learn from stored teacher outputs.

Each iteration's draw is seeded by its number and all state is in one file, so a killed run continues bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.training.batches import draw_batch
from s2p_deploy.calib.training.learner import Learner
from s2p_deploy.calib.training.log import IterationRecord, RowRecord, SelectionRecord, cosine, log_text
from s2p_deploy.calib.training.losses import RowErrors, row_weights
from s2p_deploy.calib.training.objective import Objective
from s2p_deploy.calib.training.row_errors import row_counts, row_errors
from s2p_deploy.calib.training.selection import trajectory_error
from s2p_deploy.errors import S2PError
from s2p_deploy.records.whole_files import write_tensors, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.calib.training.selection import HeldOut
    from s2p_deploy.calib.training.setting import TrainingSetting
    from s2p_deploy.calib.training.state import TrainingState
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import LatentDataset

LOG = "training.jsonl"
CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training came to: the rows' errors before and after, its iterations, the checkpoints that were tried."""

    start: RowErrors
    final: RowErrors
    iterations: tuple[IterationRecord, ...]
    selections: tuple[SelectionRecord, ...]


def train(
    state: TrainingState, dataset: LatentDataset, setting: TrainingSetting, work: Path, progress: Progress
) -> TrainingOutcome:
    """Trains ``state`` in place, from the checkpoint in ``work`` where there is one; ``work`` gets ``training.jsonl``.

    ``state`` is as it was before training, also where there is a checkpoint. It ends on the CPU with the parameters
    that are kept: of the best checkpoint, averaged, or the last ones, as the recipe says.

    Raises:
        InputError: ``freezing.what: layers`` misses a site's sensitivity.
        S2PError: the loss is no finite number any more.
    """
    training, checkpoint = setting.training, work / CHECKPOINT
    work.mkdir(parents=True, exist_ok=True)
    learner = Learner(state, setting)
    if checkpoint.exists():
        learner.restore(load_file(checkpoint))
    else:
        learner.begin(row_errors(state, dataset, setting.guidance_scale, progress, "starting error"))
        if training.iterations:
            _select(learner, setting.held_out)
        write_tensors(checkpoint, learner.tensors())
    start = learner.start
    objective = Objective(setting, state, row_weights(setting, state.rows, start, _shares(state, dataset, setting)))
    progress("training", learner.iteration, training.iterations)
    while learner.iteration < training.iterations:
        _iterate(learner, objective, dataset)
        last = learner.iteration == training.iterations
        if last or learner.iteration % training.selection.every == 0:
            _select(learner, setting.held_out)
        if last or learner.iteration % training.save_every == 0:
            write_tensors(checkpoint, learner.tensors())
            _write_log(learner, work, start, None)
        progress("training", learner.iteration, training.iterations)
    learner.finish()
    final = start
    if training.iterations:
        final = row_errors(state, dataset, setting.guidance_scale, progress, "final error")
    state.to(torch.device("cpu"))
    _write_log(learner, work, start, final if training.iterations else None)
    return TrainingOutcome(start, final, tuple(learner.iterations), tuple(learner.selections))


def _iterate(learner: Learner, objective: Objective, dataset: LatentDataset) -> None:
    """One update, which is not made where the loss is not finite."""
    training, state, iteration = learner.training, learner.state, learner.iteration
    learner.clear_gradients()
    out = feature = 0.0
    present = []
    for part in range(training.accumulate):
        batch = draw_batch(dataset, state.rows, training, iteration, part).to(objective.weights.device)
        losses = objective.add_gradients(batch, 1 / training.accumulate)
        out, feature = out + losses[0] / training.accumulate, feature + losses[1] / training.accumulate
        present.append(batch.index)
    loss = out + training.features.weight * feature
    if not math.isfinite(loss):
        raise S2PError(f"training loss became {loss} at iteration {iteration}: lower the recipe's training rates")
    learner.update(torch.cat(present).unique(), cosine(iteration, training.iterations), out, feature)


def _select(learner: Learner, held_out: HeldOut | None) -> None:
    if held_out is None:
        return
    with learner.as_kept():
        learner.select(trajectory_error(learner.state.answer, held_out.to(learner.state.act_scales.rows.device)))


def _shares(state: TrainingState, dataset: LatentDataset, setting: TrainingSetting) -> torch.Tensor:
    """How often each calibrated row is drawn, float64 [calibrated rows]."""
    counts = row_counts(dataset, state.rows).double()
    if setting.training.order == "serial":
        counts = torch.ones_like(counts)
    return counts / counts.sum()


def _write_log(learner: Learner, work: Path, start: RowErrors, final: RowErrors | None) -> None:
    rows = [RowRecord(0, start)] + ([] if final is None else [RowRecord(learner.iteration, final)])
    text = log_text(learner.training, learner.state.rows.tolist(), rows, learner.iterations, learner.selections)
    write_text(work / LOG, text)
