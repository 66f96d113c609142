from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.calib.streaming.act_scales import DEFAULT_PEAK, DEFAULT_RISE, default_scales, given_scales
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import load_recipe
from s2p_deploy.records import ActPoint, CalibratedModel, PrecisionPlan, PromptSet, SitePlan, TimestepTable

PLAN = PrecisionPlan(
    (
        SitePlan("a", "conv", "int8", "a", ""),
        SitePlan("b", "conv", "int4", "b", ""),
        SitePlan("c", "conv", "none", None, ""),
    ),
    (ActPoint("a", "int8", ("a",)), ActPoint("b", "int4", ("b",), timestep_dependent=False)),
)
TIMESTEPS = TimestepTable("S", {}, 3, (0.0, 5.0, 10.0), np.linspace(0, 1, 11))


def test_default_scales_by_hand() -> None:
    table = default_scales(PLAN, TIMESTEPS)
    assert table.points == ("a", "b")
    assert table.trained == (0, 5, 10)
    rising = DEFAULT_PEAK / 127 * np.array([1, 1 + DEFAULT_RISE / 2, 1 + DEFAULT_RISE])
    np.testing.assert_allclose(table.scales[[0, 5, 10], 0], rising, rtol=1e-6)
    assert bool((np.diff(table.scales[:, 0]) > 0).all())  # every other row between its neighbours
    np.testing.assert_allclose(table.scales[:, 1], DEFAULT_PEAK / 7, rtol=1e-6)
    assert table.scales.dtype == np.float32


def test_a_plan_without_act_points_has_no_columns() -> None:
    assert default_scales(PrecisionPlan(PLAN.sites[2:], ()), TIMESTEPS).scales.shape == (11, 0)


@pytest.fixture(scope="module")
def given(base: BasePipeline, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    """Calibrated for real, on two of the schedule's calls."""
    recipe = load_recipe("ptq", {"sampling": {"steps": 6}, "dataset": {"prompts": 1}, "scales": {"latents": 1}})
    return calibrate(base, recipe, prompts, tmp_path_factory.mktemp("given") / "model")


def test_given_scales_are_matched_by_name(given: CalibratedModel) -> None:
    some = given.plan.act_points[3:6][::-1]
    plan = PrecisionPlan(tuple(site for site in given.plan.sites if site.act_point in {p.name for p in some}), some)
    table, timesteps = given_scales(plan, dataclasses.replace(given.timesteps, calibrated=(1.0, 500.0)), given)
    assert table.points == tuple(point.name for point in some)
    np.testing.assert_array_equal(table.scales, given.scales.scales[:, [5, 4, 3]])
    assert timesteps.calibrated == given.timesteps.calibrated
    assert table.trained == given.scales.trained


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (ActPoint("elsewhere", "int8", ("elsewhere",)), "has nothing for act point elsewhere, which needs int8 scales"),
        ("int4", r"has int8 for act point [\w.]+, which needs int4 scales"),
    ],
)
def test_a_missing_act_point_is_one_line(given: CalibratedModel, point: ActPoint | str, message: str) -> None:
    known = given.plan.act_points[0]
    wanted = point if isinstance(point, ActPoint) else dataclasses.replace(known, activations=point)
    plan = PrecisionPlan((SitePlan(wanted.sites[0], "conv", "int4", wanted.name, ""),), (wanted,))
    with pytest.raises(InputError, match=message) as raised:
        given_scales(plan, given.timesteps, given)
    assert "\n" not in str(raised.value)


def test_scales_of_another_noise_schedule_are_refused(given: CalibratedModel) -> None:
    other = dataclasses.replace(given.timesteps, angle=given.timesteps.angle * 0.9)
    with pytest.raises(InputError, match="its noise levels are of another schedule"):
        given_scales(given.plan, other, given)


def test_scales_that_do_not_cover_the_schedule_are_refused(given: CalibratedModel) -> None:
    early = dataclasses.replace(given, timesteps=dataclasses.replace(given.timesteps, calibrated=(1.0, 2.0)))
    with pytest.raises(InputError, match="is outside the calibrated table"):
        given_scales(given.plan, given.timesteps, early)


def test_scales_of_a_simulation_are_refused(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    overrides = {"sampling": {"steps": 2}, "dataset": {"prompts": 1}, "scales": {"latents": 1, "zero_point": True}}
    model = calibrate(base, load_recipe("ptq", overrides), prompts, tmp_path / "model")
    with pytest.raises(InputError, match="it exists in simulation only"):
        given_scales(model.plan, model.timesteps, model)
