from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.calib.starting_scales import DEFAULT_PEAK, DEFAULT_RISE, default_scales, given_scales
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import ActivationQuantizer, CalibratedModel, LayerPlan, PrecisionPlan, PromptSet, TimestepTable

PLAN = PrecisionPlan(
    (
        LayerPlan("a", "conv", "int8", "a", ""),
        LayerPlan("b", "conv", "int4", "b", ""),
        LayerPlan("c", "conv", "none", None, ""),
    ),
    (ActivationQuantizer("a", "int8", ("a",)), ActivationQuantizer("b", "int4", ("b",), timestep_dependent=False)),
)
TIMESTEPS = TimestepTable("S", {}, 3, (0.0, 5.0, 10.0), np.linspace(0, 1, 11))


def test_default_scales_by_hand() -> None:
    table = default_scales(PLAN, TIMESTEPS)
    assert table.quantizers == ("a", "b")
    assert table.calibrated == (0, 5, 10)
    rising = DEFAULT_PEAK / 127 * np.array([1, 1 + DEFAULT_RISE / 2, 1 + DEFAULT_RISE])
    np.testing.assert_allclose(table.scales[[0, 5, 10], 0], rising, rtol=1e-6)
    assert bool((np.diff(table.scales[:, 0]) > 0).all())  # every other row between its neighbours
    np.testing.assert_allclose(table.scales[:, 1], DEFAULT_PEAK / 7, rtol=1e-6)
    assert table.scales.dtype == np.float32


def test_a_plan_without_activation_quantizers_has_no_columns() -> None:
    assert default_scales(PrecisionPlan(PLAN.layers[2:], ()), TIMESTEPS).scales.shape == (11, 0)


@pytest.fixture(scope="module")
def given(base: BasePipeline, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    """Calibrated for real, on two of the schedule's calls."""
    recipe = Recipe.load("ptq", {"sampling": {"steps": 6}, "dataset": {"prompts": 1}, "scales": {"latents": 1}})
    return calibrate(base, recipe, prompts, tmp_path_factory.mktemp("given") / "model")


def test_given_scales_are_matched_by_name(given: CalibratedModel) -> None:
    some = given.plan.activation_quantizers[3:6][::-1]
    plan = PrecisionPlan(
        tuple(layer for layer in given.plan.layers if layer.activation_quantizer in {p.name for p in some}), some
    )
    table, timesteps = given_scales(plan, dataclasses.replace(given.timesteps, calibrated=(1.0, 500.0)), given)
    assert table.quantizers == tuple(quantizer.name for quantizer in some)
    np.testing.assert_array_equal(table.scales, given.scales.scales[:, [5, 4, 3]])
    assert timesteps.calibrated == given.timesteps.calibrated
    assert table.calibrated == given.scales.calibrated


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (
            ActivationQuantizer("elsewhere", "int8", ("elsewhere",)),
            "has nothing for activation quantizer elsewhere, which needs int8 scales",
        ),
        ("int4", r"has int8 for activation quantizer [\w.]+, which needs int4 scales"),
    ],
)
def test_a_missing_act_point_is_one_line(
    given: CalibratedModel, quantizer: ActivationQuantizer | str, message: str
) -> None:
    known = given.plan.activation_quantizers[0]
    wanted = (
        quantizer if isinstance(quantizer, ActivationQuantizer) else dataclasses.replace(known, activations=quantizer)
    )
    plan = PrecisionPlan((LayerPlan(wanted.layers[0], "conv", "int4", wanted.name, ""),), (wanted,))
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


def test_scales_of_a_model_that_no_engine_can_run_are_refused(given: CalibratedModel) -> None:
    other = dataclasses.replace(given, research="10-bit activations")
    with pytest.raises(InputError, match="no engine has 10-bit activations"):
        given_scales(given.plan, given.timesteps, other)
