"""Losses and batch orders that lost against the product's: they weigh timesteps by their effect on the last latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from s2p_deploy.calib.losses import OutputLoss, timestep_means
from s2p_deploy.calib.samples import Batch, BatchOrder, take_batch, take_paired_batch
from s2p_deploy.calib.trajectories import Trajectory, TrajectoryInputs, trajectory_inputs
from s2p_deploy.errors import InputError
from s2p_deploy.records.files import write_tensors
from s2p_deploy.timesteps import angles_of_timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.losses import TimestepErrors
    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import LatentDataset, TimestepTable
    from s2p_research.recipe import ResearchRecipe, ResearchTraining

STAGE = "timestep influence"
_INFLUENCE = "timestep_influence"
_INFLUENCE_PROMPTS = 8


class WeightedLoss(OutputLoss):
    """L_out with given ``factors`` [calibrated] in place of the starting errors."""

    def __init__(self, training: ResearchTraining, factors: Tensor) -> None:
        super().__init__(training)
        self.factors = factors.double()

    def importance(self, error: Tensor) -> Tensor:
        """Returns the factors."""
        del error
        return self.factors


class GuidedLoss(OutputLoss):
    """Errors of the guided output, of paired batches, over their ``start`` [calibrated]."""

    def __init__(self, training: ResearchTraining, guidance_scale: float, start: Tensor) -> None:
        super().__init__(training)
        self.guidance_scale, self.start = guidance_scale, start

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Computes the guided errors float32 [b / 2] of a paired batch [b, C, H, W]."""
        return guided_errors(output, target, self.guidance_scale)

    def starting_errors(self, measured: TimestepErrors) -> Tensor:
        """Returns the guided errors before training."""
        del measured
        return self.start


def guided_errors(output: Tensor, target: Tensor, guidance_scale: float) -> Tensor:
    """Computes mean squared errors float32 [b / 2] of ``g e_c - (g - 1) e_u`` in a paired batch [b, C, H, W]."""
    cond, uncond = (output.float() - target).chunk(2)
    return (guidance_scale * cond - (guidance_scale - 1) * uncond).square().mean((1, 2, 3))


def research_loss(
    recipe: ResearchRecipe,
    request: CalibrationRequest,
    source: FloatPipeline,
    teacher: IndexedDenoiser | None,
    state: TrainingState,
    dataset: LatentDataset,
) -> OutputLoss:
    """Makes the loss that a recipe names; ``state`` is as it starts."""
    training, guidance = recipe.training, recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    if training.loss == "sampler":
        return WeightedLoss(training, sampler_steps(source.timesteps, state.calibrated))
    if training.loss == "trajectory":
        assert teacher is not None, "the hooks say so"
        return WeightedLoss(training, _influence_once(recipe, request, source, teacher, state))
    if training.loss == "guided":
        start = timestep_means(
            state,
            dataset,
            lambda output, target: guided_errors(output, target, guidance).unsqueeze(0),
            request.context.progress,
            "starting guided error",
        )
        return GuidedLoss(training, guidance, start[0])
    return OutputLoss(training)


class ResearchBatchOrder(BatchOrder):
    """Batches of all timesteps or, for ``order: serial``, of one per iteration from noise to picture, over and over.

    The ``guided`` loss gets both branches of half as many samples.
    """

    def __init__(self, dataset: LatentDataset, calibrated: Tensor, training: ResearchTraining) -> None:
        super().__init__(dataset, calibrated, training)
        self.serial, self.paired = training.order == "serial", training.loss == "guided"

    def draw(self, iteration: int, microbatch: int = 0) -> Batch:
        """Draws one of the ``training.accumulate`` batches of an iteration."""
        training, dataset, calibrated = self.training, self.dataset, self.calibrated
        generator = np.random.default_rng((training.seed, iteration * training.accumulate + microbatch))
        among = np.arange(len(dataset.timestep_indices))
        if self.serial:
            among = np.flatnonzero(
                dataset.timestep_indices == int(calibrated[len(calibrated) - 1 - iteration % len(calibrated)])
            )
        if self.paired:
            which = generator.integers(len(among), size=max(1, training.batch // 2))
            return take_paired_batch(dataset, calibrated, among[which])
        which = generator.integers(len(among), size=training.batch)
        uncond = generator.random(training.batch) < training.empty_prompt_share
        return take_batch(dataset, calibrated, among[which], uncond)

    def shares(self) -> Tensor:
        """Returns how often each calibrated timestep is drawn, float64 [calibrated]."""
        if not self.serial:
            return super().shares()
        return torch.ones(len(self.calibrated), dtype=torch.float64) / len(self.calibrated)


def sampler_steps(timesteps: TimestepTable, calibrated: Tensor) -> Tensor:
    """Computes (d x_0 / d output)^2 of the schedule alone, float64 [calibrated], of ascending timestep indices.

    A deterministic step of a variance-preserving schedule from one calibrated timestep to the next below moves latents
    in units of x_0 by eps (level' - level), level = sigma / alpha; below the last the level is 0. An error of the
    output v is one of alpha v in eps, an error of the output x_0 one of alpha / sigma in eps. A step of flow matching
    moves latents by the velocity times the difference of sigma.
    """
    angles = torch.from_numpy(angles_of_timesteps(timesteps.timesteps[calibrated.numpy()], timesteps)).double()
    levels = angles if timesteps.flow_matching else angles.tan()
    steps = levels.diff(prepend=levels.new_zeros(1)).square()
    if timesteps.flow_matching:
        return steps
    prediction = timesteps.scheduler_config["prediction_type"]
    per_eps = {"epsilon": torch.ones_like(angles), "v_prediction": angles.cos(), "sample": 1 / angles.tan()}
    if prediction not in per_eps:
        raise InputError(f"training.loss: sampler is not derived for prediction_type {prediction}: choose another loss")
    return steps * per_eps[prediction].square()


def _influence_once(
    recipe: ResearchRecipe,
    request: CalibrationRequest,
    source: FloatPipeline,
    teacher: IndexedDenoiser,
    state: TrainingState,
) -> Tensor:
    """Measures the influence on some of the dataset's prompts, once, and keeps it in the work folder."""
    file = request.partial / f"{_INFLUENCE}.safetensors"
    if not file.exists():
        inputs = trajectory_inputs(source, request.prompts.first(_INFLUENCE_PROMPTS), recipe)
        write_tensors(file, {_INFLUENCE: timestep_influence(teacher, state, inputs, request.context.progress)})
    return load_file(file)[_INFLUENCE]


@torch.no_grad()
def timestep_influence(
    teacher: IndexedDenoiser, state: TrainingState, inputs: TrajectoryInputs, progress: Progress
) -> Tensor:
    """Measures the last latents' squared error over the output's squared error, float32 [calibrated].

    The floating-point trajectories are run once. Then, for each timestep, they are run again from its first call with
    that timestep alone quantized: the change of the last latents is divided by the error of the outputs. A timestep at
    which quantizing changes nothing has influence 0.

    Raises:
        InputError: a calibrated timestep is not among the sampler's calls.
    """
    batches = list(inputs.batches())
    moved = torch.zeros(len(state.calibrated), dtype=torch.float64)
    caused = torch.zeros_like(moved)
    for number, batch in enumerate(batches):
        starts, final = _floating_point(teacher, batch)
        for position, index in enumerate(state.calibrated.tolist()):
            if index not in starts:
                raise InputError(
                    f"the sampler makes no call at timestep index {index}, which is calibrated: set its steps"
                )
            last, error = _quantized_at(index, starts[index].copy(), teacher, state)
            moved[position] += float((last - final).double().square().mean()) * len(final)
            caused[position] += error * len(final)
            progress(STAGE, number * len(moved) + position + 1, len(batches) * len(moved))
    return torch.where(caused > 0, moved / caused, 0.0).float()


def _floating_point(teacher: IndexedDenoiser, inputs: TrajectoryInputs) -> tuple[dict[int, Trajectory], Tensor]:
    """Runs a trajectory; returns it before the first call of each timestep index, and the last latents."""
    trajectory = Trajectory(inputs)
    starts: dict[int, Trajectory] = {}
    while not trajectory.finished:
        if trajectory.timestep_index not in starts:
            starts[trajectory.timestep_index] = trajectory.copy()
        trajectory.advance(trajectory.predict(teacher))
    return starts, trajectory.latents


def _quantized_at(
    index: int, trajectory: Trajectory, teacher: IndexedDenoiser, state: TrainingState
) -> tuple[Tensor, float]:
    """Quantizes the calls at one timestep index; returns the last latents and those calls' mean squared error."""
    errors = []
    while not trajectory.finished:
        output = trajectory.predict(teacher)
        if trajectory.timestep_index == index:
            reference, output = output, trajectory.predict(state.predict)
            errors.append(float((output - reference).double().square().mean()))
        trajectory.advance(output)
    return trajectory.latents, sum(errors) / len(errors)
