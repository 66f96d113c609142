"""S2P training: batches mix prompts and timesteps, and learn from stored teacher outputs.

Each iteration's draw is seeded by its number and all state is in one file, so a killed run continues bit for bit on a
CPU.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.learner import IterationRecord, Learner, SelectionRecord
from s2p_deploy.calib.losses import Objective, OutputLoss, TimestepErrors, feature_targets, timestep_errors
from s2p_deploy.calib.pictures import changed_pictures
from s2p_deploy.calib.samples import BatchOrder, on_device
from s2p_deploy.calib.trajectories import TrajectoryInputs, final_latents, trajectory_inputs
from s2p_deploy.errors import InputError
from s2p_deploy.records.files import write_tensors, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.calib.trajectories import Denoise, FloatPipeline
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.recipe import Recipe, Training
    from s2p_deploy.records import LatentDataset, PromptSet

LOG = "training.jsonl"
CHECKPOINT = "training.safetensors"
RATES = ("weight_rate", "weight_scale_rate", "act_scale_rate")


def cosine(iteration: int, iterations: int) -> float:
    """Computes the factor of every rate: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


@dataclass(frozen=True)
class HeldOut:
    """Prompts that nothing learns from, and where the teacher takes them: ``final`` float32 [n, C, H, W]."""

    inputs: TrajectoryInputs
    final: Tensor


def held_out_trajectories(source: FloatPipeline, teacher: Denoise, prompts: PromptSet, recipe: Recipe) -> HeldOut:
    """Runs the floating-point ``teacher`` over held-out ``prompts`` under the recipe's sampling."""
    started = changed_pictures(source, teacher, prompts, recipe)
    inputs = trajectory_inputs(source, prompts, recipe, **started)
    return HeldOut(inputs, final_latents(teacher, inputs))


def trajectory_error(denoise: Denoise, held_out: HeldOut) -> float:
    """Computes the median over the prompts of the last latents' relative error (of 2-norms). NaN where latents are."""
    latents = final_latents(denoise, held_out.inputs)
    errors = (latents - held_out.final).flatten(1).norm(dim=1) / held_out.final.flatten(1).norm(dim=1)
    return float(torch.quantile(errors, 0.5))


@dataclass(frozen=True)
class TrainingSetting:
    """The recipe's section, and what training needs beside its state.

    ``order`` of the batches, None: drawn over all samples; ``teacher`` for feature losses: the floating-point denoiser
    with the module paths of the trained one; ``held_out`` where ``selection.prompts`` is not 0;
    ``learning_rate(iteration, iterations)`` the factor of all rates.
    """

    training: Training
    loss: OutputLoss
    order: BatchOrder | None = None
    teacher: IndexedDenoiser | None = None
    held_out: HeldOut | None = None
    learning_rate: Callable[[int, int], float] = cosine


@dataclass(frozen=True)
class TrainingOutcome:
    """Errors by timestep before and after a training, its iterations, and the checkpoints that were tried."""

    start: TimestepErrors
    final: TimestepErrors
    iterations: tuple[IterationRecord, ...]
    selections: tuple[SelectionRecord, ...]


def train(
    state: TrainingState, dataset: LatentDataset, setting: TrainingSetting, work: Path, progress: Progress
) -> TrainingOutcome:
    """Trains ``state`` in place, from the checkpoint in ``work`` where there is one; ``work`` gets ``training.jsonl``.

    ``state`` is as it was before training, also where there is a checkpoint. It ends with the parameters that are kept:
    of the best checkpoint, averaged, or the last ones, as the recipe says. Its device decides the bits, as the number
    of threads does. Where the checkpoints fall decides none; an interrupt leaves one of the last whole iteration.

    Raises:
        InputError: the setting lacks what its recipe needs, or the recipe asks for two things that exclude each other.
        S2PError: the loss is not finite.
    """
    _check(setting, state)
    training, checkpoint = setting.training, work / CHECKPOINT
    work.mkdir(parents=True, exist_ok=True)
    learner = Learner(state, setting)
    if checkpoint.exists():
        learner.restore(load_file(checkpoint))
    else:
        learner.begin(timestep_errors(state, dataset, progress, "starting error"))
        if training.iterations:
            _select(learner, setting.held_out)
        write_tensors(checkpoint, learner.tensors())
    start = learner.start
    order = setting.order or BatchOrder(dataset, state.calibrated, training)
    objective = Objective(setting, state, setting.loss.weights(start, order.shares()))
    progress("training", learner.iteration, training.iterations)

    def save() -> None:
        write_tensors(checkpoint, learner.tensors())
        _write_log(work, learner, setting, None)

    whole, saved = True, time.monotonic()
    try:
        while learner.iteration < training.iterations:
            positions, losses = _add_gradients(learner, objective, order)
            whole = False
            learner.update(positions, setting.learning_rate(learner.iteration, training.iterations), *losses)
            last = learner.iteration == training.iterations
            if last or learner.iteration % training.selection.every == 0:
                _select(learner, setting.held_out)
            whole = True
            if last or time.monotonic() - saved >= 60 * training.save_minutes:
                save()
                saved = time.monotonic()
            progress("training", learner.iteration, training.iterations)
    except KeyboardInterrupt:
        if whole:  # gradients are made anew, a half update cannot be taken back
            save()
        raise
    learner.finish()
    final = timestep_errors(state, dataset, progress, "final error") if training.iterations else None
    _write_log(work, learner, setting, final)
    return TrainingOutcome(start, final or start, tuple(learner.iterations), tuple(learner.selections))


def _check(setting: TrainingSetting, state: TrainingState) -> None:
    training, denoiser = setting.training, state.denoiser
    targets, selection = training.features.targets, training.selection.prompts
    features = feature_targets(training, denoiser.inner, denoiser.plan)
    for needed, given, key, need in (
        (targets != "none", setting.teacher is not None, f"features.targets: {targets}", "a teacher"),
        (
            targets != "none",
            bool(features),
            f"features.targets: {targets}",
            f"{targets} layers",
        ),
        (selection > 0, setting.held_out is not None, "selection.prompts", "held-out prompts"),
    ):
        if needed and not given:
            raise InputError(f"recipe training.{key} needs {need}")
    if training.adapter_rank and training.freezing.what == "oscillation":
        raise InputError("recipe training.adapter_rank has no codes to freeze: set training.freezing.what: none")


def _add_gradients(learner: Learner, objective: Objective, order: BatchOrder) -> tuple[Tensor, Tensor]:
    """Computes the gradients of an iteration's batches; returns the timesteps present, int64, and the two losses."""
    training, iteration, device = learner.training, learner.iteration, learner.state.device
    learner.clear_gradients()
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    present = []
    for microbatch in range(training.accumulate):
        batch = order.draw(iteration, microbatch)
        present.append(batch.position)  # on the CPU, where finding the distinct ones waits for nothing
        losses = losses + objective.add_gradients(batch.to(device), 1 / training.accumulate) / training.accumulate
    return on_device(torch.cat(present).unique(), device), losses


def _select(learner: Learner, held_out: HeldOut | None) -> None:
    if held_out is None:
        return
    with learner.as_kept():
        learner.select(trajectory_error(learner.state.predict, held_out))


def _write_log(work: Path, learner: Learner, setting: TrainingSetting, final: TimestepErrors | None) -> None:
    errors = [(0, learner.start)] + ([] if final is None else [(learner.iteration, final)])
    calibrated = learner.state.calibrated.tolist()
    write_text(work / LOG, log_text(setting, calibrated, errors, learner.iterations, learner.selections))


def log_text(
    setting: TrainingSetting,
    calibrated: Sequence[int],
    errors: Sequence[tuple[int, TimestepErrors]],
    iterations: Sequence[IterationRecord],
    selections: Sequence[SelectionRecord],
) -> str:
    """Formats the log as JSON lines in the order of events; ``kind`` is ``timesteps``, ``selection`` or ``iteration``.

    ``errors``: number of updates, and the errors of all ``calibrated`` timestep indices after them.
    """
    training = setting.training
    lines: list[tuple[int, int, dict[str, Any]]] = []
    for updates, measured in errors:
        figures = {
            "timestep_indices": list(calibrated),
            "sqnr_db": measured.sqnr(),
            "error": measured.error.tolist(),
        }
        last = updates > 0  # the errors at the end are those of what was selected
        lines.append((updates, 2 if last else 0, {"kind": "timesteps", "iteration": updates, **figures}))
    for tried in selections:
        error = tried.error if math.isfinite(tried.error) else None  # JSON has no NaN
        line = {"kind": "selection", "iteration": tried.iteration, "error": error, "best": tried.best}
        lines.append((tried.iteration, 1, line))
    for number, record in enumerate(iterations):
        factor = setting.learning_rate(number, training.iterations)
        line = {"kind": "iteration", "iteration": number, "loss": record.loss(training), "out_loss": record.out}
        if training.features.targets != "none":
            line["feature_loss"] = record.feature
        if training.freezing.what == "oscillation":
            line |= {"frozen": int(record.frozen), "oscillating": int(record.oscillating)}
        lines.append((number, 3, line | {name: factor * getattr(training, name) for name in RATES}))
    return "".join(json.dumps(line) + "\n" for _, _, line in sorted(lines, key=lambda entry: entry[:2]))
