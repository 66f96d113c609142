from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import FloatPipeline, Trajectory, TrajectoryInputs, trajectory_inputs
from s2p_deploy.context import silent
from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet
from s2p_research.losses import timestep_influence


@pytest.fixture
def inputs(source: FloatPipeline, prompts: PromptSet, recipe: Recipe) -> TrajectoryInputs:
    return trajectory_inputs(source, prompts.first(2), recipe)


@torch.no_grad()
def test_each_row_alone_is_quantized(
    float_denoiser: IndexedDenoiser, state: TrainingState, inputs: TrajectoryInputs
) -> None:
    found = timestep_influence(float_denoiser, state, inputs, silent)
    assert found.shape == state.calibrated.shape
    walk = Trajectory(inputs)
    final = walk.copy().finish(float_denoiser)
    row, errors = int(state.calibrated[-2]), []  # PNDM calls it twice

    def mixed(sample: Tensor, rows: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        reference: Tensor = float_denoiser(sample, rows, texts, added_cond)
        if int(rows[0]) != row:
            return reference
        answer = state.predict(sample, rows, texts, added_cond)
        errors.append((answer - reference).square().mean())
        return answer

    moved = (walk.finish(mixed) - final).square().mean()
    assert len(errors) == 2
    torch.testing.assert_close(found[-2], moved / torch.stack(errors).mean())


def test_a_row_that_is_never_called_is_named(
    float_denoiser: IndexedDenoiser, state: TrainingState, inputs: TrajectoryInputs
) -> None:
    state.calibrated[0] = 7
    with pytest.raises(InputError, match="the sampler makes no call at timestep index 7"):
        timestep_influence(float_denoiser, state, inputs, silent)
