"""The loss of training: L_out on the teacher's stored outputs, and L_sen or distillation on the teacher's features."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.plan import SENSITIVE
from s2p_deploy.calib.samples import sample_counts, take_paired_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from s2p_deploy.calib.samples import Batch
    from s2p_deploy.calib.training import TrainingSetting
    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.recipe import Training
    from s2p_deploy.records import LatentDataset, PrecisionPlan

DELTA = 1e-6  # keeps a relative error finite where the teacher's feature is zero
_SAMPLES = 32  # measured together, each under both branches


@dataclass(frozen=True)
class TimestepErrors:
    """Means over all samples of each calibrated timestep and both branches, float32 [calibrated].

    ``error``: squared error of the outputs; ``signal``: mean square of the teacher's.
    """

    error: Tensor
    signal: Tensor

    def sqnr(self) -> list[float]:
        """Signal to quantization noise of each calibrated timestep, in dB."""
        return [float(value) for value in 10 * torch.log10(self.signal / self.error)]


@torch.no_grad()
def timestep_errors(state: TrainingState, dataset: LatentDataset, progress: Progress, stage: str) -> TimestepErrors:
    """Measures the model as it is over all samples and both branches."""

    def measure(output: Tensor, target: Tensor) -> Tensor:
        plain = squared_errors(output, target).unflatten(0, (2, -1)).mean(0)
        return torch.stack([plain, target.square().mean((1, 2, 3)).unflatten(0, (2, -1)).mean(0)])

    return TimestepErrors(*timestep_means(state, dataset, measure, progress, stage))


@torch.no_grad()
def timestep_means(
    state: TrainingState,
    dataset: LatentDataset,
    measure: Callable[[Tensor, Tensor], Tensor],
    progress: Progress,
    stage: str,
) -> Tensor:
    """Averages measurements of paired batches over the samples of each calibrated timestep, float32 [m, calibrated].

    ``measure`` takes outputs and targets [2 n, C, H, W] of a paired batch and returns m measurements [m, n].
    """
    which = np.arange(len(dataset.timestep_indices))
    measured = []
    for begin in range(0, len(which), _SAMPLES):
        chunk = which[begin : begin + _SAMPLES]
        batch = take_paired_batch(dataset, state.calibrated, chunk).to(state.device)
        measured.append(measure(state.predict(*batch.inputs()), batch.target).double())
        progress(stage, begin + len(chunk), len(which))
    values = torch.cat(measured, 1).cpu()  # the one wait; a CPU adds in the same order every time
    position = torch.searchsorted(state.calibrated, torch.from_numpy(dataset.timestep_indices[which]))
    total = values.new_zeros(len(values), len(state.calibrated)).index_add_(1, position, values)
    means = total / sample_counts(dataset, state.calibrated)
    return means.clamp_min(torch.finfo(torch.float32).tiny).float()


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    """Computes each sample's mean squared error, float32 [b], of outputs [b, C, H, W]."""
    return (output.float() - target).square().mean((1, 2, 3))


class OutputLoss:
    """L_out: squared errors of the outputs, weighted by timestep.

    ``training.loss: timestep_balanced`` weighs a sample by 1 over its timestep's starting error to the power
    ``balance``, ``uniform`` (the paper's) not at all.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Computes the errors of a batch [b, C, H, W]: float32 [b], or [b / 2] where batches are paired."""
        return squared_errors(output, target)

    def starting_errors(self, measured: TimestepErrors) -> Tensor:
        """Returns the mean of :meth:`errors` before training, [calibrated]."""
        return measured.error

    def importance(self, error: Tensor) -> Tensor:
        """Weighs timesteps by their starting ``error`` float64 [calibrated], up to a common factor."""
        return error**-self.training.balance

    def weights(self, start: TimestepErrors, shares: Tensor) -> Tensor:
        """Computes the factor of a sample's error by calibrated timestep, float32 [calibrated].

        Scaled so that the loss is 1 at the start; ``uniform`` stays the plain error. ``shares`` float64 [calibrated]:
        how often each timestep is drawn; they sum to 1.
        """
        error = self.starting_errors(start).double()
        if self.training.loss == "uniform":
            return torch.ones_like(error).float()
        weights = self.importance(error)
        return (weights / (shares * weights * error).sum()).float()


class Objective:
    """L = L_out + weight * L_features, and its gradients.

    ``weights`` float32 [calibrated] multiply the errors of L_out. Losses and scales are float32 in every recipe;
    ``training.precision`` is that of the denoiser's arithmetic.
    """

    def __init__(self, setting: TrainingSetting, state: TrainingState, weights: Tensor) -> None:
        self.setting, self.state = setting, state
        self.weights = weights.to(state.device)
        self.targets = feature_targets(setting.training, state.denoiser.inner, state.denoiser.plan)
        self.teacher = setting.teacher if self.targets else None

    def add_gradients(self, batch: Batch, share: float) -> Tensor:
        """Adds the gradients of ``share`` times the batch's loss.

        Returns L_out and L_features, without its weight: float64 [2], which the host has not waited for.
        """
        wanted = self._teacher_features(batch)

        def learn(inner: IndexedDenoiser) -> Tensor:
            with tapped(inner, self.targets) as features, self._precision():
                output = inner(*batch.inputs())
            errors = self.setting.loss.errors(output, batch.target)
            out = (errors * self.weights[batch.position[: len(errors)]]).mean()
            section = self.setting.training.features
            feature = feature_loss(features, wanted, relative=section.relative) if wanted else out.new_zeros(())
            (share * (out + section.weight * feature)).backward()
            return torch.stack([out.detach(), feature.detach()]).double()

        # A recomputed forward pass needs the scales again, so the backward pass is inside too.
        return self.state.denoiser.within(self.state.act_scales(batch.position), learn)

    @torch.no_grad()
    def _teacher_features(self, batch: Batch) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        with tapped(self.teacher, self.targets) as wanted, self._precision():
            self.teacher(*batch.inputs())
        return wanted

    def _precision(self) -> torch.autocast:
        half = self.setting.training.precision == "bf16"
        return torch.autocast(self.state.device.type, torch.bfloat16, enabled=half)


def feature_targets(training: Training, denoiser: IndexedDenoiser, plan: PrecisionPlan) -> tuple[str, ...]:
    """Lists the module paths in the network whose outputs are compared; none where the recipe has no feature loss."""
    targets = training.features.targets
    if targets == "blocks":
        return tuple(name for name, _ in denoiser.network.named_modules() if denoiser.family.distilled.fullmatch(name))
    if targets == "sensitive":
        return tuple(layer.name for layer in plan.layers if layer.rule == SENSITIVE)
    return ()


@contextmanager
def tapped(denoiser: IndexedDenoiser, targets: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of ``targets`` of a forward pass inside; of a block's tuple, the image's."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[name] = output if isinstance(output, torch.Tensor) else output[denoiser.family.image_output]

        return hook

    hooks = [denoiser.network.get_submodule(name).register_forward_hook(keep(name)) for name in targets]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def feature_loss(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, relative: bool) -> Tensor:
    """Averages the targets' squared errors, float32 [].

    ``relative`` divides each sample's squared error by the teacher's square plus 1e-6; otherwise it is the mean over
    the elements (L_sen of the paper).
    """
    losses = []
    for name, reference in wanted.items():
        goal = reference.float()
        error = (outputs[name].float() - goal).square()
        if relative:
            losses.append((error.flatten(1).sum(1) / (goal.square().flatten(1).sum(1) + DELTA)).mean())
        else:
            losses.append(error.mean())
    return torch.stack(losses).mean()
