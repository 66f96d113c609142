"""Timesteps that no schedule named: their indices, and what an engine has at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.engines import load_engine
from s2p_deploy.engines.spare_timesteps import SpareTimesteps
from s2p_deploy.errors import InputError
from s2p_deploy.records import TimestepTable
from s2p_deploy.timesteps import scales_of_timesteps
from tests.engines.test_conditioning import FEATURES, SCALES, TIMESTEPS, WEIGHTS, telling_engine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TABLE = TimestepTable("DDIMScheduler", {}, 2, (1, 901), np.linspace(0.1, 1.5, 1000), fractional=np.asarray([50.5]))


class Assigned(dict[int, float]):
    """What every index stands for, as an engine would know it; ``times`` counts the assignments."""

    times = 0

    def __call__(self, indices: Sequence[int], timesteps: NDArray[np.float64]) -> None:
        self.times += 1
        self.update(zip(indices, timesteps.tolist(), strict=True))


def test_indices_follow_those_of_the_table() -> None:
    assigned = Assigned()
    spare = SpareTimesteps(TABLE, 3, assigned)
    assert spare.indices([7, 50.5, 20.25, 10.5, 20.2504]).tolist() == [7, 1000, 1002, 1001, 1003]
    assert assigned == {1001: 10.5, 1002: 20.25, 1003: 20.2504}
    assert (assigned.times, len(spare)) == (1, 3)
    assert spare.indices([20.2501]).tolist() == [1002]  # to a thousandth of a timestep
    assert assigned.times == 1


def test_the_index_that_was_asked_for_longest_ago_gets_the_next_timestep() -> None:
    assigned = Assigned()
    spare = SpareTimesteps(TABLE, 2, assigned)
    for timestep, index in ((10.5, 1001), (20.5, 1002), (10.5, 1001), (30.5, 1002), (10.5, 1001), (20.5, 1002)):
        assert spare.indices(timestep).tolist() == [index]
        assert assigned[index] == timestep


@given(st.lists(st.lists(st.sampled_from(np.arange(1.5, 12).tolist()), min_size=1, max_size=4), max_size=12))
def test_every_index_stands_for_its_timestep_when_it_is_given_out(calls: list[list[float]]) -> None:
    assigned = Assigned()
    spare = SpareTimesteps(TABLE, 4, assigned)
    for timesteps in calls:
        assert [assigned[index] for index in spare.indices(timesteps).tolist()] == timesteps
        assert len(spare) <= 4


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ([998.5], "outside the calibrated table"),
        ([float("nan")], "is no number"),
        ([1.5, 2.5, 3.5], "3 timesteps that the engine is not bound to, 2 are the most: take fewer steps"),
    ],
)
def test_what_has_no_index_is_refused(timesteps: list[float], words: str) -> None:
    spare = SpareTimesteps(TABLE, 2, Assigned())
    with pytest.raises(InputError, match=words):
        spare.indices(timesteps)
    assert len(spare) == 0


@pytest.mark.parametrize("added", [0, 3])
def test_an_engine_computes_scales_and_features_of_timesteps_that_were_not_named(tmp_path: Path, added: int) -> None:
    engine = telling_engine(tmp_path, added)
    prompts = np.float32([[0, 0, 0], [1, 0, 2]])[:, :added]
    with load_engine(engine, schedules=[[30.5]]) as runner:
        conditions = {"added_cond": prompts} if added else {}
        for timesteps in ([30.5, 700.25], [700.25, 100.75], [100.75, 5]):
            runner.check_timesteps(timesteps)
            inputs = {"sample": np.ones((2, 3)), "timestep_index": runner.indices(timesteps)}
            told = runner.infer(inputs | conditions)["noise_pred"]
            scales = scales_of_timesteps(timesteps, SCALES, TIMESTEPS)
            np.testing.assert_allclose(told[:, :1], scales, rtol=0.02)  # of the table's own: interpolated before
            features = np.float32(timesteps)[:, None] * FEATURES + (prompts @ WEIGHTS if added else 0)
            np.testing.assert_allclose(told[:, 1:], features, rtol=1e-5)
        with pytest.raises(InputError, match=r"a timestep_index is outside the scale table, .* 0 to 1002"):
            runner.infer(inputs | conditions | {"timestep_index": np.asarray([0, 1003])})
        with pytest.raises(InputError, match="outside the calibrated table"):
            runner.check_timesteps([1200.0])
