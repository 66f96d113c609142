from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib.losses import OutputLoss, TimestepErrors
from s2p_deploy.calib.samples import calibrated_indices
from s2p_deploy.calib.training import TrainingSetting, train
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.context import silent
from s2p_deploy.errors import InputError
from s2p_deploy.records import LatentDataset, TimestepTable
from s2p_research.losses import GuidedLoss, ResearchBatchOrder, WeightedLoss, guided_errors, sampler_steps
from s2p_research.recipe import ResearchTraining

TRAINING = ResearchTraining(iterations=6, batch=4, save_minutes=0)
# sigma over alpha 0.5, 1, 3 at the timesteps 1, 3, 4
LEVELS = torch.tensor([0.1, 0.5, 0.8, 1.0, 3.0], dtype=torch.float64)
CALIBRATED = torch.tensor([1, 3, 4])
START = TimestepErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([100.0, 20.0, 4.0]))
SHARES = torch.tensor([0.5, 0.25, 0.25])


def schedule(prediction: str) -> TimestepTable:
    config = {"prediction_type": prediction}
    return TimestepTable("a scheduler", config, 3, (1.0, 3.0, 4.0), LEVELS.arctan().numpy())


def changed(**changes: object) -> ResearchTraining:
    return ResearchTraining.model_validate(TRAINING.model_dump() | changes)


def test_a_step_of_the_schedule_by_hand() -> None:
    expected = torch.tensor([0.5**2, (1 - 0.5) ** 2, (3 - 1) ** 2], dtype=torch.float64)
    torch.testing.assert_close(sampler_steps(schedule("epsilon"), CALIBRATED), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_moves_the_clean_latents_by_an_error_of_any_prediction(prediction: str) -> None:
    """One deterministic step from each calibrated timestep to the next below, with and without an error of 1e-3."""
    angles = LEVELS.arctan()
    below = [None, 1, 3]
    steps = sampler_steps(schedule(prediction), CALIBRATED)
    for place, index in enumerate(CALIBRATED.tolist()):
        alpha, sigma = angles[index].cos(), angles[index].sin()
        level = 0.0 if below[place] is None else float(LEVELS[below[place]])

        def next_in_units_of_clean(
            output: Tensor, alpha: Tensor = alpha, sigma: Tensor = sigma, level: float = level
        ) -> Tensor:
            latents = torch.tensor(0.7, dtype=torch.float64)
            eps, clean = {
                "epsilon": lambda: (output, (latents - sigma * output) / alpha),
                "v_prediction": lambda: (sigma * latents + alpha * output, alpha * latents - sigma * output),
                "sample": lambda: ((latents - alpha * output) / sigma, output),
            }[prediction]()
            return clean + level * eps

        output = torch.tensor(0.3, dtype=torch.float64)
        moved = (next_in_units_of_clean(output + 1e-3) - next_in_units_of_clean(output)) / 1e-3
        torch.testing.assert_close(moved.square(), steps[place], rtol=1e-6, atol=0)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(InputError, match="sampler is not derived for prediction_type other"):
        sampler_steps(schedule("other"), CALIBRATED)


@pytest.mark.parametrize(
    ("loss", "ratios"),
    [
        (GuidedLoss(TRAINING, 3.0, torch.tensor([3.0, 5.0, 8.0])), [1 / 3, 1 / 5, 1 / 8]),
        (WeightedLoss(TRAINING, sampler_steps(schedule("epsilon"), CALIBRATED)), [0.25, 0.25, 4]),
        (WeightedLoss(TRAINING, torch.tensor([2.0, 0.0, 1.0])), [2, 0, 1]),
    ],
    ids=["guided", "sampler", "trajectory"],
)
def test_weights_are_relative_and_start_the_loss_at_one(loss: OutputLoss, ratios: list[float]) -> None:
    weights = loss.weights(START, SHARES)
    torch.testing.assert_close(weights / weights[0], torch.tensor(ratios) / ratios[0])
    assert float((SHARES * weights * loss.starting_errors(START)).sum()) == pytest.approx(1)


def test_the_guided_error_by_hand() -> None:
    # Two pairs of one element: errors 1 and 2 of the text branches, 3 and -1 of the empty ones, g = 3.
    output = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(4, 1, 1, 1)
    expected = [(3 * 1 - 2 * 3) ** 2, (3 * 2 + 2 * 1) ** 2]
    assert GuidedLoss(TRAINING, 3.0, SHARES).errors(output, torch.zeros_like(output)).tolist() == expected


def test_a_guided_error_is_the_error_of_the_guided_output() -> None:
    output, target = (torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def guided(values: Tensor) -> Tensor:
        cond, uncond = values.chunk(2)
        return uncond + 7.5 * (cond - uncond)

    expected = (guided(output) - guided(target)).square().mean((1, 2, 3))
    torch.testing.assert_close(guided_errors(output, target, 7.5), expected)


def test_serial_order_goes_from_noise_to_picture_and_round(dataset: LatentDataset) -> None:
    calibrated = torch.tensor(calibrated_indices(dataset))
    order = ResearchBatchOrder(dataset, calibrated, changed(order="serial", accumulate=2))
    seen = [
        set(torch.cat([order.draw(iteration, part).timestep_index for part in range(2)]).tolist())
        for iteration in range(len(calibrated) + 1)
    ]
    assert seen == [{index} for index in [*reversed(calibrated.tolist()), int(calibrated[-1])]]
    assert order.shares().tolist() == pytest.approx([1 / len(calibrated)] * len(calibrated))


def test_the_guided_loss_sees_both_branches(dataset: LatentDataset) -> None:
    order = ResearchBatchOrder(dataset, torch.tensor(calibrated_indices(dataset)), changed(loss="guided", batch=9))
    drawn = order.draw(0)
    assert len(drawn.sample) == 8
    assert torch.equal(drawn.sample[:4], drawn.sample[4:])
    assert torch.equal(drawn.timestep_index[:4], drawn.timestep_index[4:])
    assert not torch.equal(drawn.target[:4], drawn.target[4:])


@pytest.mark.parametrize("changes", [{"order": "serial"}, {"loss": "guided"}], ids=str)
def test_training_in_another_order_starts_at_one(
    changes: dict[str, Any], untrained: TrainingState, dataset: LatentDataset, tmp_path: Path
) -> None:
    still = {"weight_rate": 0, "weight_scale_rate": 0, "act_scale_rate": 0, "batch": 64}
    training, state = changed(**changes, **still), copy.deepcopy(untrained)
    order = ResearchBatchOrder(dataset, state.calibrated, training)
    loss = OutputLoss(training)
    if training.loss == "guided":
        loss = GuidedLoss(training, 2.5, _guided_start(state, dataset))
    outcome = train(state, dataset, TrainingSetting(training, loss, order), tmp_path, silent)
    assert np.mean([record.out for record in outcome.iterations]) == pytest.approx(1.0, rel=0.15)


def _guided_start(state: TrainingState, dataset: LatentDataset) -> Tensor:
    from s2p_deploy.calib.losses import timestep_means

    return timestep_means(
        state, dataset, lambda output, target: guided_errors(output, target, 2.5).unsqueeze(0), silent, "start"
    )[0]
