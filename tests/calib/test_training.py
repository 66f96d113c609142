from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from s2p_deploy.calib import QuantizedDenoiser, fp_denoiser, plan_from_recipe
from s2p_deploy.calib.scale_start import calibrated_rows, starting_act_scales, starting_weight_scales
from s2p_deploy.calib.training import draw_batch, row_errors, take, train
from s2p_deploy.calib.training_state import ActScales, TrainingState
from s2p_deploy.errors import S2PError
from s2p_deploy.families import BasePipeline, discover_sites
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe, Training
from s2p_deploy.records import LatentDataset

NewState = Callable[[Training], TrainingState]


@pytest.fixture
def new_state(base: BasePipeline, recipe: Recipe, dataset: LatentDataset) -> NewState:
    """Makes a starting state, the same each time."""

    def make(training: Training) -> TrainingState:
        hot = fp_denoiser(base).requires_grad_()
        plan = plan_from_recipe(recipe, discover_sites(hot))
        scales = starting_act_scales(hot, plan, dataset, 4, silent)
        denoiser = QuantizedDenoiser(hot, plan, starting_weight_scales(hot, plan))
        static = [not point.timestep_dependent for point in plan.act_points]
        return TrainingState(denoiser, ActScales(scales, static), calibrated_rows(dataset), training)

    return make


def test_a_batch_is_its_iterations_alone(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    training = recipe.training.model_copy(update={"batch": 256, "empty_prompt_share": 0.25})
    batch, again, other = (draw_batch(dataset, rows, training, iteration) for iteration in (7, 7, 8))
    assert torch.equal(batch.sample, again.sample)
    assert not torch.equal(batch.sample, other.sample)
    assert torch.equal(rows[batch.index], batch.row)
    assert set(batch.index.tolist()) == set(range(len(rows)))
    empty = torch.from_numpy(dataset.texts[dataset.uncond_text[0]])
    share = (batch.texts == empty).flatten(1).all(1).double().mean()
    assert 0.15 < float(share) < 0.35


def test_a_sample_meets_its_own_branchs_answer(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    batch = take(dataset, rows, np.array([4, 4]), np.array([True, False]))
    assert torch.equal(batch.target[0], torch.from_numpy(dataset.uncond[4]).float())
    assert torch.equal(batch.target[1], torch.from_numpy(dataset.cond[4]).float())
    assert torch.equal(batch.texts[1], torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[4]]]))
    assert batch.row.tolist() == [dataset.rows[4]] * 2


def test_training_lowers_the_error_of_the_rows(
    new_state: NewState, dataset: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    training = recipe.training.model_copy(update={"iterations": 30, "batch": 16, "weight_rate": 1e-3})
    state = new_state(training)
    start = state.act_scales.table()
    train(state, dataset, training, tmp_path, silent)
    final = row_errors(state, dataset, silent, "final")
    assert float((final / state.row_error).mean()) < 0.7
    assert not torch.equal(state.act_scales.table(), start)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(30))
    assert lines[0]["weight_rate"] == 1e-3 > lines[29]["weight_rate"]


def test_balanced_loss_starts_at_the_rows_own_errors(
    new_state: NewState, dataset: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    losses = {}
    for loss in ("row_balanced", "uniform"):
        training = recipe.training.model_copy(update={"iterations": 1, "batch": 512, "loss": loss})
        state = new_state(training)
        train(state, dataset, training, tmp_path / loss, silent)
        losses[loss] = (state.losses[0], state.row_error)
    assert losses["row_balanced"][0] == pytest.approx(1.0, rel=0.1)
    rows = torch.tensor(calibrated_rows(dataset))
    counts = torch.bincount(torch.searchsorted(rows, torch.from_numpy(dataset.rows)))
    mean = float((counts * losses["uniform"][1]).sum() / counts.sum())
    assert losses["uniform"][0] == pytest.approx(mean, rel=0.15)


def test_absent_rows_stay_where_they_are(
    new_state: NewState, dataset: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    training = recipe.training.model_copy(update={"iterations": 1, "batch": 1})
    state = new_state(training)
    start = state.act_scales.table()
    train(state, dataset, training, tmp_path, silent)
    moved = (state.act_scales.table() != start).any(1).nonzero().flatten()
    assert moved.tolist() == draw_batch(dataset, state.rows, training, 0).index.tolist()


def test_an_interrupted_training_goes_on_to_the_same_bits(
    new_state: NewState, dataset: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    whole = new_state(recipe.training)
    train(whole, dataset, recipe.training, tmp_path / "whole", silent)
    with pytest.raises(KeyboardInterrupt):
        train(new_state(recipe.training), dataset, recipe.training, tmp_path / "part", interrupt)
    seen: list[int] = []
    resumed = new_state(recipe.training)
    train(resumed, dataset, recipe.training, tmp_path / "part", lambda stage, done, total: seen.append(done))
    assert seen == [4, 5, 6]  # from the last checkpoint, with no second pass for the starting error
    expected = whole.tensors()
    assert set(resumed.tensors()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.tensors().items())


def test_a_loss_that_is_no_number_stops_the_run(
    new_state: NewState, dataset: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    state = new_state(recipe.training)

    def break_weights(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 3:
            with torch.no_grad():
                state.denoiser.hot.unet.conv_out.bias.fill_(torch.nan)

    with pytest.raises(S2PError, match="training loss became nan at iteration 3"):
        train(state, dataset, recipe.training, tmp_path, break_weights)
