from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2p_deploy.calib.training.losses import RowErrors, batch_errors, guided_errors, row_weights, sampler_steps
from s2p_deploy.calib.training.setting import TrainingSetting
from s2p_deploy.recipe import Recipe

# sqrt((1 - abar) / abar): 0.5, 1, 3 at these timesteps.
ALPHAS = torch.tensor([0.99, 0.8, 0.6, 0.5, 0.1], dtype=torch.float64)
LEVELS = ((1 - ALPHAS) / ALPHAS).sqrt()
ROWS = torch.tensor([1, 3, 4])
START = RowErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0, 8.0]), torch.tensor([100.0, 20.0, 4.0]))
SHARES = torch.tensor([0.5, 0.25, 0.25])


def setting(recipe: Recipe, loss: str) -> TrainingSetting:
    training = recipe.training.model_copy(update={"loss": loss})
    return TrainingSetting(training, 3.0, noise_levels=LEVELS, influence=torch.tensor([2.0, 0.0, 1.0]))


def test_a_step_of_the_schedule_by_hand() -> None:
    expected = torch.tensor([0.5**2, (1 - 0.5) ** 2, (3 - 1) ** 2], dtype=torch.float64)
    torch.testing.assert_close(sampler_steps(LEVELS[ROWS]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("loss", "ratios"),
    [
        ("row_balanced", [1, 1 / 2, 1 / 4]),
        ("guided", [1 / 3, 1 / 5, 1 / 8]),
        ("sampler", [0.25, 0.25, 4]),
        ("trajectory", [2, 0, 1]),
    ],
)
def test_weights_are_relative_and_start_the_loss_at_one(recipe: Recipe, loss: str, ratios: list[float]) -> None:
    weights = row_weights(setting(recipe, loss), ROWS, START, SHARES)
    torch.testing.assert_close(weights / weights[0], torch.tensor(ratios) / ratios[0])
    error = START.guided if loss == "guided" else START.error
    assert float((SHARES * weights * error).sum()) == pytest.approx(1)


def test_the_uniform_loss_weighs_nothing(recipe: Recipe) -> None:
    assert row_weights(setting(recipe, "uniform"), ROWS, START, SHARES).tolist() == [1, 1, 1]


def test_the_guided_error_by_hand(recipe: Recipe) -> None:
    # Two pairs of one element: errors 1 and 2 of the text branches, 3 and -1 of the empty ones, g = 3.
    output = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(4, 1, 1, 1)
    target = torch.zeros_like(output)
    expected = [(3 * 1 - 2 * 3) ** 2, (3 * 2 + 2 * 1) ** 2]
    assert guided_errors(output, target, 3.0).tolist() == expected
    assert batch_errors(output, target, setting(recipe, "guided")).tolist() == expected
    assert batch_errors(output, target, setting(recipe, "uniform")).tolist() == [1, 4, 9, 1]


def test_a_guided_error_is_the_error_of_the_guided_output() -> None:
    output, target = (torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def guided(values: Tensor) -> Tensor:
        cond, uncond = values.chunk(2)
        return uncond + 7.5 * (cond - uncond)

    expected = (guided(output) - guided(target)).square().mean((1, 2, 3))
    torch.testing.assert_close(guided_errors(output, target, 7.5), expected)


def test_sqnr_is_in_decibels() -> None:
    assert START.sqnr() == pytest.approx([20, 10, 0])
