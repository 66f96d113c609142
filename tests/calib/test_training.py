from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2p_deploy.calib import fp_denoiser
from s2p_deploy.calib.learner import Learner, PerTimestepAdam
from s2p_deploy.calib.losses import OutputLoss
from s2p_deploy.calib.plan import SENSITIVE
from s2p_deploy.calib.samples import BatchOrder
from s2p_deploy.calib.training import (
    CHECKPOINT,
    LOG,
    HeldOut,
    TrainingOutcome,
    TrainingSetting,
    held_out_trajectories,
    train,
    trajectory_error,
)
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import FloatPipeline
from s2p_deploy.context import Progress, silent
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import BasePipeline, IndexedDenoiser
from s2p_deploy.recipe import Freezing, Recipe, Training
from s2p_deploy.records import LatentDataset, Prompt, PromptSet

SENSITIVE_LAYERS = ("down_blocks.0.resnets.0.conv1", "conv_out")
Run = Callable[..., tuple[TrainingState, TrainingOutcome]]


@pytest.fixture(scope="module")
def teacher(base: BasePipeline) -> IndexedDenoiser:
    return fp_denoiser(base, 50)


@pytest.fixture(scope="module")
def held_out(source: FloatPipeline, teacher: IndexedDenoiser, recipe: Recipe) -> HeldOut:
    prompts = PromptSet((Prompt("h0", "a large blue disc"), Prompt("h1", "two squares")))
    return held_out_trajectories(source, teacher, prompts, recipe)


@pytest.fixture
def setting(teacher: IndexedDenoiser, held_out: HeldOut, recipe: Recipe) -> TrainingSetting:
    """Everything that any recipe may need."""
    return TrainingSetting(recipe.training, OutputLoss(recipe.training), teacher=teacher, held_out=held_out)


@pytest.fixture
def run(untrained: TrainingState, dataset: LatentDataset, setting: TrainingSetting, tmp_path: Path) -> Run:
    """Trains a new state with changes to the recipe's training."""

    def start(
        folder: str = "run", progress: Progress = silent, **changes: object
    ) -> tuple[TrainingState, TrainingOutcome]:
        state = copy.deepcopy(untrained)
        chosen = changed(setting, state, **changes)
        return state, train(state, dataset, chosen, tmp_path / folder, progress)

    return start


def changed(setting: TrainingSetting, state: TrainingState, **changes: object) -> TrainingSetting:
    training = Training.model_validate(setting.training.model_dump() | changes)
    held_out = setting.held_out if training.selection.prompts else None
    plan = state.denoiser.plan
    layers = (
        replace(layer, sensitivity=float(number), rule=SENSITIVE if layer.name in SENSITIVE_LAYERS else layer.rule)
        for number, layer in enumerate(plan.layers)
    )
    state.denoiser.plan = replace(plan, layers=tuple(layers))
    return replace(setting, training=training, loss=OutputLoss(training), held_out=held_out)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_training_lowers_the_error_of_the_rows(run: Run, tmp_path: Path) -> None:
    _, outcome = run(iterations=25, batch=16, weight_rate=1e-3)
    assert float((outcome.final.error / outcome.start.error).mean()) < 0.7
    found = lines(tmp_path / "run")
    iterations = [line for line in found if line["kind"] == "iteration"]
    assert [line["iteration"] for line in iterations] == list(range(25))
    assert iterations[0]["weight_rate"] == 1e-3 > iterations[24]["weight_rate"]
    before, after = found[0], found[-1]
    assert (before["kind"], after["kind"], after["iteration"]) == ("timesteps", "timesteps", 25)
    expected = 10 * torch.log10(outcome.final.signal / outcome.final.error)
    torch.testing.assert_close(torch.tensor(after["sqnr_db"]), expected)
    assert all(better > worse for better, worse in zip(after["sqnr_db"], before["sqnr_db"], strict=True))


STILL = {"weight_rate": 0, "weight_scale_rate": 0, "act_scale_rate": 0}


def test_a_weighted_loss_starts_at_one(run: Run) -> None:
    _, outcome = run(iterations=6, batch=64, **STILL)
    assert sum(record.out for record in outcome.iterations) / 6 == pytest.approx(1.0, rel=0.15)


def test_the_uniform_loss_is_the_mean_squared_error(run: Run, dataset: LatentDataset) -> None:
    state, outcome = run(iterations=1, batch=256, loss="uniform")
    rows = torch.searchsorted(state.calibrated, torch.from_numpy(dataset.timestep_indices))
    assert outcome.iterations[0].out == pytest.approx(float(outcome.start.error[rows].mean()), rel=0.15)


def test_absent_rows_stay_where_they_are(run: Run, dataset: LatentDataset, recipe: Recipe) -> None:
    state, _ = run(iterations=1, batch=1)
    moved = (state.act_scales.table() != torch.tensor(0.05).log().exp()).any(1).nonzero().flatten()
    training = recipe.training.model_copy(update={"batch": 1})
    assert moved.tolist() == BatchOrder(dataset, state.calibrated, training).draw(0).position.tolist()


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "oscillation": {"freezing": {"what": "oscillation", "every": 2}, "weight_rate": 1e-2},
    "ema": {"ema": 0.9, "checkpointing": True},
    "adapters": {"adapter_rank": 2, "freezing": {"what": "layers"}},
    "selection": {"selection": {"prompts": 2, "every": 2}, "ema": 0.5, "weight_rate": 1e-3},
    "accumulate": {"accumulate": 2, "features": {"targets": "blocks"}, "precision": "bf16"},
}


class KilledError(Exception):
    """What ends a run without a word to it."""


@pytest.mark.parametrize("mode", MODES)
def test_a_training_that_ended_early_goes_on_to_the_same_bits(run: Run, tmp_path: Path, mode: str) -> None:
    def end(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 5:
            raise KilledError

    changes = MODES[mode]
    whole, _ = run("whole", **changes)
    with pytest.raises(KilledError):
        run("part", end, **changes)
    resumed, seen = resumed_run(run, **changes)
    assert seen == [5, 6]  # from the last checkpoint
    assert_ended_alike(tmp_path, resumed, whole)


def test_where_the_checkpoints_fall_decides_no_bit(run: Run, tmp_path: Path) -> None:
    def end(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 5:
            raise KilledError

    whole, _ = run("whole", save_minutes=0)
    with pytest.raises(KilledError):
        run("part", end, save_minutes=60)
    resumed, seen = resumed_run(run, save_minutes=60)
    assert seen == [0, 1, 2, 3, 4, 5, 6]  # no hour had passed
    assert_ended_alike(tmp_path, resumed, whole)


class Interrupted(OutputLoss):
    """Interrupted in the forward pass of its fifth iteration."""

    calls = 0

    def errors(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return super().errors(output, target)


def test_an_interrupt_saves_the_last_whole_iteration(
    run: Run, untrained: TrainingState, dataset: LatentDataset, setting: TrainingSetting, tmp_path: Path
) -> None:
    whole, _ = run("whole", save_minutes=60)
    state = copy.deepcopy(untrained)
    chosen = changed(setting, state, save_minutes=60)
    with pytest.raises(KeyboardInterrupt):
        train(state, dataset, replace(chosen, loss=Interrupted(chosen.training)), tmp_path / "part", silent)
    resumed, seen = resumed_run(run, save_minutes=60)
    assert seen == [4, 5, 6]
    assert_ended_alike(tmp_path, resumed, whole)


def test_an_interrupted_update_is_not_saved(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of the parameters have been moved: the last checkpoint stays."""
    whole, _ = run("whole", save_minutes=60)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PerTimestepAdam, "step", interrupt)  # the second of the two optimizers
        with pytest.raises(KeyboardInterrupt):
            run("part", save_minutes=60)
    resumed, seen = resumed_run(run, save_minutes=60)
    assert seen[0] == 0
    assert_ended_alike(tmp_path, resumed, whole)


def resumed_run(run: Run, **changes: object) -> tuple[TrainingState, list[int]]:
    """Ends the run in folder ``part``; returns its state and the numbers of iterations that it reported."""
    seen: list[int] = []
    state, _ = run("part", lambda stage, done, total: seen.append(done) if stage == "training" else None, **changes)
    return state, seen


def assert_ended_alike(folder: Path, resumed: TrainingState, whole: TrainingState) -> None:
    for name in (CHECKPOINT, LOG):
        assert (folder / "part" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    expected = whole.modules().state_dict()
    assert set(resumed.modules().state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.modules().state_dict().items())


def test_a_finished_training_is_not_done_again(run: Run, tmp_path: Path) -> None:
    changes = {"selection": {"prompts": 2, "every": 2}, "adapter_rank": 2}
    first, outcome = run(**changes)
    log = (tmp_path / "run" / LOG).read_bytes()
    again, repeated = run(**changes)
    assert outcome.iterations == repeated.iterations
    assert (tmp_path / "run" / LOG).read_bytes() == log
    expected = first.modules().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.modules().state_dict().items())


def test_the_best_by_selection_is_what_is_left(run: Run, held_out: HeldOut, tmp_path: Path) -> None:
    # A rate that ruins the model: the start is the best.
    changes = {"selection": {"prompts": 2, "every": 2}, "weight_rate": 0.3}
    state, outcome = run(**changes)
    assert [tried.iteration for tried in outcome.selections] == [0, 2, 4, 6]
    assert [tried.best for tried in outcome.selections] == [True, False, False, False]
    assert outcome.selections[-1].error > outcome.selections[0].error
    with torch.no_grad():
        assert trajectory_error(state.predict, held_out) == outcome.selections[0].error
    assert torch.equal(outcome.final.error, outcome.start.error)
    kinds = [(line["kind"], line["iteration"]) for line in lines(tmp_path / "run")]
    assert kinds[:4] == [("timesteps", 0), ("selection", 0), ("iteration", 0), ("iteration", 1)]
    assert kinds[-2:] == [("selection", 6), ("timesteps", 6)]


def test_an_error_that_is_no_number_is_never_the_best(state: TrainingState, setting: TrainingSetting) -> None:
    learner = Learner(state, replace(setting, held_out=None))
    for error in (math.nan, 0.5, math.nan, 0.5, 0.25):
        learner.select(error)
    assert [tried.best for tried in learner.selections] == [False, True, False, False, True]


def test_the_average_is_what_is_left(run: Run) -> None:
    # Decay min(0.5, 2 / 11) after the only update: the average has gone 9/11 of the way.
    start = new_state_weight(run, iterations=0)
    last = new_state_weight(run, iterations=1)
    kept = new_state_weight(run, iterations=1, ema=0.5)
    torch.testing.assert_close(kept, start + (last - start) * 9 / 11)


def new_state_weight(run: Run, **changes: object) -> torch.Tensor:
    state, _ = run(str(changes), weight_rate=1e-2, **changes)
    return state.denoiser.layer("conv_out").weight.detach()


def test_accumulated_batches_are_one_update(run: Run, tmp_path: Path) -> None:
    _, outcome = run(iterations=2, accumulate=3, **STILL)
    _, single = run("single", iterations=6, **STILL)
    parts = [record.out for record in single.iterations]
    assert outcome.iterations[0].out == pytest.approx(sum(parts[:3]) / 3)
    assert outcome.iterations[1].out == pytest.approx(sum(parts[3:]) / 3)


def test_recomputed_activations_change_no_gradient(run: Run) -> None:
    features = {"targets": "sensitive", "relative": False}  # one of them inside what is recomputed
    plain, _ = run("plain", iterations=2, features=features)
    recomputed, _ = run("recomputed", iterations=2, features=features, checkpointing=True)
    expected = plain.modules().state_dict()
    for name, value in recomputed.modules().state_dict().items():
        assert torch.equal(value, expected[name])


def test_no_iterations_keep_the_start(run: Run, tmp_path: Path) -> None:
    _, outcome = run(iterations=0, ema=0.9, selection={"prompts": 2})
    assert outcome.final is outcome.start
    assert [line["kind"] for line in lines(tmp_path / "run")] == ["timesteps"]


def test_a_loss_that_is_no_number_stops_the_run(
    untrained: TrainingState, dataset: LatentDataset, setting: TrainingSetting, tmp_path: Path
) -> None:
    state = copy.deepcopy(untrained)

    def break_weights(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 3:
            with torch.no_grad():
                state.denoiser.inner.network.conv_out.bias.fill_(torch.nan)

    with pytest.raises(S2PError, match="training loss became nan at iteration 3"):
        train(state, dataset, changed(setting, state), tmp_path, break_weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"targets": "blocks"}}, "recipe training.features.targets: blocks needs a teacher"),
        (
            {"freezing": {"what": "layers"}},
            "freezing.what: layers needs the sensitivity of conv_in: set recipe.mixed.sensitivity",
        ),
        ({"selection": {"prompts": 2}}, "recipe training.selection.prompts needs held-out prompts"),
        ({"adapter_rank": 1, "freezing": Freezing(what="oscillation")}, "adapter_rank has no codes to freeze"),
    ],
)
def test_what_a_recipe_needs_has_to_be_there(
    state: TrainingState,
    dataset: LatentDataset,
    recipe: Recipe,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    training = Training.model_validate(recipe.training.model_dump() | changes)
    with pytest.raises(InputError, match=message):
        train(state, dataset, TrainingSetting(training, OutputLoss(training)), tmp_path, silent)
