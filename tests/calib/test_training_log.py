from __future__ import annotations

import json

import pytest
import torch

from s2p_deploy.calib.learner import IterationRecord, SelectionRecord
from s2p_deploy.calib.losses import OutputLoss, TimestepErrors
from s2p_deploy.calib.training import TrainingSetting, cosine, log_text
from s2p_deploy.recipe import Training

ERRORS = TimestepErrors(torch.tensor([1.0]), torch.tensor([100.0]))


def test_rates_fall_by_a_cosine() -> None:
    assert [cosine(iteration, 4) for iteration in (0, 2, 4)] == pytest.approx([1, 0.5, 0])


def test_lines_are_in_the_order_of_events() -> None:
    training = Training.model_validate(
        {"iterations": 2, "features": {"targets": "blocks", "weight": 0.5}, "freezing": {"what": "oscillation"}}
    )
    iterations = [IterationRecord(1.0, 0.25, 0, 3), IterationRecord(0.5, 0.125, 2, 1)]
    selections = [SelectionRecord(0, 0.5, best=True), SelectionRecord(2, 0.75, best=False)]
    setting = TrainingSetting(training, OutputLoss(training))
    text = log_text(setting, [5], [(0, ERRORS), (2, ERRORS)], iterations, selections)
    found = [json.loads(line) for line in text.splitlines()]
    kinds = ["timesteps", "selection", "iteration", "iteration", "selection", "timesteps"]
    assert [line["kind"] for line in found] == kinds
    assert found[0] == {
        "kind": "timesteps",
        "iteration": 0,
        "timestep_indices": [5],
        "sqnr_db": [20.0],
        "error": [1.0],
    }
    assert found[1] == {"kind": "selection", "iteration": 0, "error": 0.5, "best": True}
    assert found[3] == {
        "kind": "iteration",
        "iteration": 1,
        "loss": 0.5625,
        "out_loss": 0.5,
        "feature_loss": 0.125,
        "frozen": 2,
        "oscillating": 1,
        "weight_rate": pytest.approx(2.5e-5),
        "weight_scale_rate": pytest.approx(5e-5),
        "act_scale_rate": pytest.approx(5e-4),
    }


def test_a_plain_training_says_nothing_of_what_it_has_not() -> None:
    training = Training(iterations=1)
    setting = TrainingSetting(training, OutputLoss(training))
    text = log_text(setting, [5], [], [IterationRecord(1.0, 0.0, 0, 0)], [])
    assert {"feature_loss", "frozen", "oscillating"}.isdisjoint(json.loads(text))
