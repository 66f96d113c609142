from __future__ import annotations

import pytest
import torch

from s2p_deploy.calib.losses import OutputLoss, TimestepErrors
from s2p_deploy.recipe import Recipe

START = TimestepErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([100.0, 20.0, 4.0]))
SHARES = torch.tensor([0.5, 0.25, 0.25])


@pytest.mark.parametrize(("balance", "ratios"), [(1.0, [1, 1 / 2, 1 / 4]), (0.5, [1, 0.5**0.5, 1 / 2])])
def test_weights_are_relative_and_start_the_loss_at_one(recipe: Recipe, balance: float, ratios: list[float]) -> None:
    loss = OutputLoss(recipe.training.model_copy(update={"balance": balance}))
    weights = loss.weights(START, SHARES)
    torch.testing.assert_close(weights / weights[0], torch.tensor(ratios))
    assert float((SHARES * weights * START.error).sum()) == pytest.approx(1)


def test_the_uniform_loss_weighs_nothing(recipe: Recipe) -> None:
    loss = OutputLoss(recipe.training.model_copy(update={"loss": "uniform"}))
    assert loss.weights(START, SHARES).tolist() == [1, 1, 1]
    output = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(4, 1, 1, 1)
    assert loss.errors(output, torch.zeros_like(output)).tolist() == [1, 4, 9, 1]


def test_sqnr_is_in_decibels() -> None:
    assert START.sqnr() == pytest.approx([20, 10, 0])
