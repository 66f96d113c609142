"""The bytes of a training, counted on fake tensors, are those that it takes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.calib.learner import Learner
from s2p_deploy.calib.losses import Objective, OutputLoss, TimestepErrors
from s2p_deploy.calib.memory import SHARE, LiveBytes
from s2p_deploy.calib.plan import Transforms, planned_layers, split_shortcuts
from s2p_deploy.calib.samples import BatchOrder
from s2p_deploy.calib.training import TrainingSetting
from s2p_deploy.calib.training_memory import (
    Division,
    Network,
    TrainingAccount,
    divisions,
    first_that_fits,
    fit_training,
)
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import FloatPipeline
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.families import IndexedDenoiser, family_of_config, indexed_skeleton
from s2p_deploy.families.time_path import TimePath
from s2p_deploy.recipe import Freezing, Recipe, Training
from s2p_deploy.records import LatentDataset, TimeTable, TransformSpec

TOKENS = 24


@pytest.fixture(scope="module")
def network(source: FloatPipeline, recipe: Recipe) -> Network:
    config, time = source.denoiser.config, source.time_source
    skeleton = indexed_skeleton(config, time).denoiser
    transforms = split_shortcuts(skeleton, recipe)
    transforms, _, plan = planned_layers(recipe, transforms, config, time, None)
    transforms.apply(skeleton)
    return Network(skeleton, plan, TOKENS)


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "checkpointing": {"checkpointing": True},
    "adapters": {"adapter_rank": 2},
    "oscillation": {"freezing": {"what": "oscillation"}, "ema": 0.9},
    "features": {"features": {"targets": "blocks"}},
}


FAST = ("accumulate", "checkpointing")


@pytest.mark.parametrize(
    "mode", [mode if mode in FAST else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES]
)
def test_the_account_is_what_a_second_iteration_takes(
    network: Network, state: TrainingState, dataset: LatentDataset, float_denoiser: IndexedDenoiser, mode: str
) -> None:
    training = Training.model_validate({"iterations": 2, "batch": 4} | MODES[mode])
    teacher = float_denoiser if training.features.targets != "none" else None
    setting = TrainingSetting(training, OutputLoss(training), teacher=teacher)
    order = BatchOrder(dataset, state.calibrated, training)
    with LiveBytes() as live:
        learner = Learner(state, setting)
        learner.begin(TimestepErrors(*torch.ones(2, len(state.calibrated))))
        objective = Objective(setting, state, torch.ones(len(state.calibrated)))
        live.add([*state.modules().parameters(), *state.modules().buffers()])
        live.add([] if teacher is None else [*teacher.parameters(), *teacher.buffers()])
        for iteration in range(2):
            live.most = live.now
            learner.clear_gradients()
            for microbatch in range(training.accumulate):
                batch = order.draw(iteration, microbatch)
                losses = objective.add_gradients(batch, 1 / training.accumulate)
            learner.update(batch.position.unique(), 1.0, *losses)
    account = TrainingAccount(replace(network, teacher=teacher is not None), training)
    assert account.peak(Division.of(training)) == pytest.approx(live.most, rel=0.02)


def test_a_call_is_what_a_call_takes(network: Network, state: TrainingState, dataset: LatentDataset) -> None:
    training = Training(iterations=1)
    inputs = BatchOrder(dataset, state.calibrated, training).draw(0).inputs()
    live = LiveBytes()
    live.add([*state.modules().parameters(), *state.modules().buffers(), *inputs])
    before = live.now
    with torch.no_grad(), live:
        state.predict(*inputs)
    account = TrainingAccount(network, training)
    assert account.call(training.batch) == pytest.approx(live.most - before, rel=0.02)


def test_the_divisions_go_from_the_fastest_to_the_smallest() -> None:
    found = [str(each) for each in divisions(Training(iterations=1), ())]
    kept = ["32 x 1", "16 x 2", "8 x 4"]
    assert found == [*kept, *(f"{batch} x {32 // batch} with checkpointing" for batch in (32, 16, 8, 4, 2, 1))]
    assert [str(each) for each in divisions(Training(iterations=1, batch=6), ())] == [
        "6 x 1",
        "6 x 1 with checkpointing",
        "3 x 2 with checkpointing",
    ]


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({"batch": 4, "accumulate": 2, "checkpointing": False}, ["4 x 2"]),
        ({"batch": 4}, ["4 x 1", "4 x 1 with checkpointing"]),
        ({"accumulate": 2}, ["32 x 2", "32 x 2 with checkpointing"]),
        ({"checkpointing": False}, ["32 x 1", "16 x 2", "8 x 4", "4 x 8", "2 x 16", "1 x 32"]),
    ],
)
def test_what_a_recipe_states_stays(stated: dict[str, Any], found: list[str]) -> None:
    training = Training(iterations=1, **stated)
    assert [str(each) for each in divisions(training, training.model_fields_set)] == found


class Written:
    """An account of a training that takes 10 bytes and for each sample 10, or 1 with checkpointing."""

    def __init__(self) -> None:
        self.looks: list[Division] = []

    def peak(self, division: Division) -> int:
        self.looks.append(division)
        return 10 + division.batch * (1 if division.checkpointing else 10)


@pytest.mark.parametrize("room", range(8, 400, 3))
def test_the_first_division_that_fits_is_taken_at_few_looks(room: int) -> None:
    choices, account = divisions(Training(iterations=1), ()), Written()
    fitting = [choice for choice in choices if Written().peak(choice) <= room]
    assert first_that_fits(account, choices, room) == (fitting[0] if fitting else None)
    assert len(account.looks) <= 5


def test_a_training_is_divided_until_it_fits(network: Network) -> None:
    training = Training(iterations=1, checkpointing=True, batch=4, accumulate=1)
    account = TrainingAccount(network, training)
    wanted = Division.of(training)
    fit = fit_training(TrainingAccount(network, training), int(account.peak(wanted) / SHARE) + 1)
    assert (fit.division, fit.bytes, fit.resting) == (wanted, account.peak(wanted), account.resting)
    assert str(fit) == "1 iterations of 4 x 1 with checkpointing: 0.0 GiB of 0.0 GiB"


def refusal(network: Network, training: Training, room: float) -> str:
    with pytest.raises(MissingEnvironmentError) as refused:
        fit_training(TrainingAccount(network, training), int(room / SHARE) + 1)
    return str(refused.value)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(network: Network) -> None:
    training = Training(iterations=1, batch=1, freezing=Freezing(what="oscillation"))
    account = TrainingAccount(network, training)
    said = refusal(network, training, account.peak(Division(1, 1, checkpointing=True)) - 1000)
    assert said.startswith("training takes 0.0 GiB at 1 x 1 with checkpointing, and 0.0 GiB of 0.0 GiB can be used: ")
    assert said.endswith("can be used: --recipe w8a8, which trains nothing")
    assert refusal(network, training, 1000).endswith("can be used: use --device cpu, or recipe ptq-stream")


@pytest.fixture(scope="module")
def wide_network(source: FloatPipeline, recipe: Recipe) -> Network:
    """So wide that adapters are much smaller than the weights; on the meta device that costs nothing."""
    config = dict(source.denoiser.config) | {"block_out_channels": [256, 512]}
    with torch.device("meta"):
        slices = TimePath(family_of_config(config).build(config)).slices
    time = TimeTable(np.zeros((1000, max(stop for _, stop in slices.values())), np.float32), slices)
    skeleton = indexed_skeleton(config, time).denoiser
    _, _, plan = planned_layers(recipe, Transforms(TransformSpec()), config, time, None)
    return Network(skeleton, plan, TOKENS)


@pytest.mark.slow
def test_adapters_are_proposed_where_they_fit(wide_network: Network) -> None:
    training = Training(iterations=1, batch=1)
    room = TrainingAccount(wide_network, training).peak(Division(1, 1, checkpointing=True)) * 0.9
    said = refusal(wide_network, training, room)
    assert "can be used: --set training.adapter_rank=16 (1 x 1, " in said
    assert said.endswith(" or --recipe w8a8, which trains nothing")


@pytest.mark.slow
def test_what_a_recipe_states_and_does_not_fit_is_refused_with_what_would(network: Network) -> None:
    stated = Training(iterations=1, batch=8, checkpointing=False)
    room = TrainingAccount(network, stated).peak(Division(8, 1, checkpointing=True))
    said = refusal(network, stated, room)
    assert said.endswith("leave batch, accumulate and checkpointing out of the recipe (8 x 1 with checkpointing fits)")


def test_a_network_that_trains_nothing_needs_room_for_one_call(network: Network) -> None:
    training = Training(iterations=0)
    account = TrainingAccount(network, training)
    room = account.weights + account.call(1)
    assert fit_training(TrainingAccount(network, training), int(room / SHARE) + 1).bytes == room
    assert refusal(network, training, room - 1000).startswith(
        "the denoiser and one sample take 0.0 GiB, and 0.0 GiB of"
    )


def test_the_account_leaves_the_network_as_it_is(network: Network) -> None:
    before = copy.deepcopy(network.denoiser.state_dict())
    TrainingAccount(network, Training(iterations=1)).peak(Division(1, 1, checkpointing=False))
    after = network.denoiser.state_dict()
    assert list(after) == list(before)
    assert all(value.device.type == "meta" for value in after.values())
