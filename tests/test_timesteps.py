from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    KDPM2DiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s2p_deploy.errors import InputError
from s2p_deploy.records import ScaleTable, TimestepTable
from s2p_deploy.records.scale_table import read_timestep_table, write_timestep_table
from s2p_deploy.records.typed_json import json_data
from s2p_deploy.timesteps import (
    angles_from_alphas,
    angles_of_timesteps,
    interpolate_scales,
    scale_origins,
    scales_for_schedule,
    timestep_indices,
    timestep_table_of,
    with_schedules,
)

TIMESTEPS = 200
BETAS = hnp.arrays(np.float64, 50, elements=st.floats(1e-5, 0.5))


def table_of(calibrated: tuple[int, ...], count: int = TIMESTEPS) -> TimestepTable:
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, count))
    return TimestepTable("DDIMScheduler", {"steps_offset": 1}, len(calibrated), calibrated, angles_from_alphas(alphas))


@st.composite
def tables_with_scales(draw: st.DrawFn) -> tuple[TimestepTable, np.ndarray]:
    calibrated = sorted(draw(st.sets(st.integers(0, TIMESTEPS - 1), min_size=1, max_size=20)))
    scales = hnp.arrays(np.float32, (len(calibrated), 3), elements=st.floats(2**-40, 2**40, width=32))
    return table_of(tuple(calibrated)), draw(scales)


def test_angles_by_hand() -> None:
    # alpha^2 = 1: no noise; 1/2: as much noise as signal; 0: noise alone
    assert angles_from_alphas(np.array([1.0, 0.5, 0.0])) == pytest.approx([0, np.pi / 4, np.pi / 2])


@given(BETAS)
def test_angles_are_finite_and_rise_with_the_timestep(betas: np.ndarray) -> None:
    angles = angles_from_alphas(np.cumprod(1 - betas))
    assert np.isfinite(angles).all()
    assert ((angles >= 0) & (angles <= np.pi / 2)).all()
    assert (np.diff(angles) >= 0).all()


@given(tables_with_scales())
def test_calibrated_timesteps_keep_every_bit(case: tuple[TimestepTable, np.ndarray]) -> None:
    table, scales = case
    full = interpolate_scales(scales, table)
    assert full.dtype == np.float32
    assert full.shape == (TIMESTEPS, 3)
    assert full[list(table.calibrated)].tobytes() == scales.tobytes()


@given(tables_with_scales())
def test_other_timesteps_lie_between_their_neighbours(case: tuple[TimestepTable, np.ndarray]) -> None:
    table, scales = case
    full = interpolate_scales(scales, table)
    first, last = table.calibrated[0], table.calibrated[-1]
    assert (full[:first] == scales[0]).all()
    assert (full[last:] == scales[-1]).all()
    for below, (start, stop) in enumerate(zip(table.calibrated, table.calibrated[1:], strict=False)):
        low, high = np.minimum(*scales[below : below + 2]), np.maximum(*scales[below : below + 2])
        assert (full[start:stop] >= low * (1 - 1e-5)).all()
        assert (full[start:stop] <= high * (1 + 1e-5)).all()


def test_interpolation_is_linear_in_log_scale_over_the_angle() -> None:
    table = TimestepTable("X", {}, 2, (0, 2), np.array([0.0, 0.25, 1.0]))
    full = interpolate_scales(np.float32([[1], [16]]), table)
    assert full[:, 0] == pytest.approx([1, 2, 16])  # a quarter of the way from 2^0 to 2^4


def test_a_model_without_activation_quantizers_has_no_columns() -> None:
    assert interpolate_scales(np.ones((2, 0), np.float32), table_of((3, 5))).shape == (TIMESTEPS, 0)


def test_scales_must_match_the_calibrated_timesteps() -> None:
    with pytest.raises(InputError, match="scales of 3 timesteps for 2"):
        interpolate_scales(np.ones((3, 1), np.float32), table_of((3, 5)))


def test_the_table_covers_six_per_cent_beyond_either_end() -> None:
    assert table_of((50, 100)).covered == (38, 112)
    assert table_of((1, 195)).covered == (0, 199)


@given(st.lists(st.integers(38, 112), min_size=1))
def test_an_integer_timestep_is_its_own_index(timesteps: list[int]) -> None:
    for kind in (np.int64, np.float32, np.float64):
        indices = timestep_indices(np.asarray(timesteps, kind), table_of((50, 100)))
        assert indices.dtype == np.int64
        assert indices.tolist() == timesteps


@pytest.mark.parametrize("timestep", [37, 113, -1, 1e9, np.inf])
def test_a_timestep_outside_is_refused(timestep: float) -> None:
    with pytest.raises(InputError, match=r"outside the calibrated table \(38 to 112\)"):
        timestep_indices([60, timestep], table_of((50, 100)))


@pytest.mark.parametrize("timestep", [60.5, np.nan])
def test_a_fractional_timestep_is_refused(timestep: float) -> None:
    with pytest.raises(InputError, match="--time-table input"):
        timestep_indices([60, timestep], table_of((50, 100)))


def test_the_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = table_of((50, 100))
    write_timestep_table(table, tmp_path / "t.json")
    read = read_timestep_table(tmp_path / "t.json")
    assert np.array_equal(read.angle, table.angle)
    assert json_data(read) == json_data(table)


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS_OF_50 = tuple(range(1, 982, 20))


def diffusion_table(calibrated: tuple[int, ...] = STEPS_OF_50) -> TimestepTable:
    alphas = EulerDiscreteScheduler(**SD).alphas_cumprod.double().numpy()
    return TimestepTable("PNDMScheduler", {}, len(calibrated), calibrated, angles_from_alphas(alphas))


def flow_table() -> TimestepTable:
    timesteps = (10.0, 400.0, 800.0, 1000.0)
    return TimestepTable(
        "FlowMatchEulerDiscreteScheduler",
        {},
        4,
        timesteps,
        np.arange(1001) / 1000,
        flow_matching=True,
        fractional=np.asarray(timesteps),
    )


@pytest.mark.parametrize("kind", ["euler", "kdpm2", "karras"])
def test_a_fractional_timesteps_level_is_its_schedulers_sigma(kind: str) -> None:
    scheduler = {
        "euler": EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
        "kdpm2": KDPM2DiscreteScheduler(**SD),
        "karras": EulerDiscreteScheduler(**SD, use_exponential_sigmas=True, timestep_spacing="leading", steps_offset=1),
    }[kind]
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.numpy()
    assert (timesteps != timesteps.round()).sum() > 15
    if kind == "kdpm2":  # asks at the first sigma and then twice at every other, half a step on
        sigmas = np.concatenate([scheduler.sigmas[:1], scheduler.sigmas_interpol[1::2], scheduler.sigmas[2::2]])
        sigmas = np.sort(sigmas[np.isfinite(sigmas) & (sigmas > 0)])
        found = np.sort(np.tan(angles_of_timesteps(timesteps, diffusion_table())))
        assert np.abs(np.log(found[:, None] / sigmas)).min(1).max() < 1e-3
    else:
        found = np.tan(angles_of_timesteps(timesteps, diffusion_table()))
        assert found == pytest.approx(scheduler.sigmas[:-1].numpy(), rel=1e-4)


def test_levels_of_training_timesteps_are_the_tables_own() -> None:
    table = diffusion_table()
    assert np.array_equal(angles_of_timesteps(np.arange(1000), table), table.angle)


def test_without_signal_the_level_stays_finite() -> None:
    table = TimestepTable("DDIMScheduler", {}, 2, (0, 3), np.asarray([0.0, 0.3, 1.2, np.pi / 2]))
    levels = angles_of_timesteps([0, 0.5, 1.5, 2.5, 3], table)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) > 0).all()
    assert levels[[0, -1]].tolist() == [0, np.pi / 2]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_level_of_flow_matching_is_sigma_itself(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(28)
    timesteps, sigmas = scheduler.timesteps.numpy(), scheduler.sigmas[:-1].numpy()
    table = with_schedules(flow_table(), [timesteps])
    assert angles_of_timesteps(timesteps, table) == pytest.approx(sigmas, abs=1e-6)
    indices = timestep_indices(timesteps, table)
    assert table.timesteps[indices] == pytest.approx(timesteps, abs=1e-3)
    scales = interpolate_scales(np.float32([[1], [2], [4], [3]]), flow_table())
    full = scales_for_schedule(ScaleTable(scales, ("p",), (0, 1, 2, 3)), flow_table(), table)
    expected = np.exp(np.interp(sigmas, [0.01, 0.4, 0.8, 1], np.log([1, 2, 4, 3])))
    assert full.scales[indices, 0] == pytest.approx(expected, rel=1e-5)


def test_schedules_bound_together_share_indices() -> None:
    table = with_schedules(diffusion_table(), [[981, 700.25, 1], [700.25, 30.5], [500.0001]])
    assert len(table) == 1002
    assert table.timesteps[1000:].tolist() == [30.5, 700.25]
    assert timestep_indices([700.25, 30.5, 700.25, 500.0001], table).tolist() == [1001, 1000, 1001, 500]
    assert timestep_indices(np.float32([30.5003]), table).tolist() == [1000]


def test_bound_to_nothing_there_are_the_training_timesteps() -> None:
    table = with_schedules(diffusion_table(), [])
    assert len(table) == 1000
    with pytest.raises(InputError, match=r"30\.5 is fractional: the engine is not bound to this schedule"):
        timestep_indices([1, 30.5], table)


def test_a_timestep_between_bound_ones_is_refused() -> None:
    table = with_schedules(diffusion_table(), [[30.5, 31.5]])
    with pytest.raises(InputError, match=r"30\.6 is fractional: the engine is not bound"):
        timestep_indices([30.5, 30.6], table)


@pytest.mark.parametrize("timestep", [-0.5, 999.5, np.inf, np.nan])
def test_a_schedule_that_leaves_the_range_cannot_be_bound(timestep: float) -> None:
    with pytest.raises(InputError, match=r"outside the calibrated table|no number"):
        with_schedules(diffusion_table(), [[500, timestep]])


def test_scales_of_fractional_timesteps_lie_on_the_way_between_calibrated_ones() -> None:
    plain = diffusion_table((1, 501, 981))
    scales = ScaleTable(interpolate_scales(np.float32([[1], [4], [2]]), plain), ("p",), plain.calibrated)
    table = with_schedules(plain, [[500.5, 700.25, 990.5, 0.5]])
    full = scales_for_schedule(scales, plain, table)
    assert full.scales[:1000].tobytes() == scales.scales.tobytes()
    clamped_low, near, between, clamped_high = full.scales[1000:, 0]
    assert (clamped_low, clamped_high) == (1, 2)
    assert scales.scales[500, 0] < near < 4
    assert min(scales.scales[700:702, 0]) <= between <= max(scales.scales[700:702, 0])
    assert scales_for_schedule(scales, plain, plain) is scales


def test_scales_that_are_there_keep_every_bit_where_others_come_between() -> None:
    own = with_schedules(diffusion_table((1, 501, 981)), [[250.5, 700.25]])
    random = np.random.default_rng(0)
    scales = ScaleTable(np.float32(random.uniform(1, 2, (len(own), 1))), ("p",), (1, 501, 981))
    bound = with_schedules(own, [[100.5, 250.5003, 600.75, 960.5]])
    assert bound.timesteps[1000:].tolist() == [100.5, 250.5, 600.75, 700.25, 960.5]
    full = scales_for_schedule(scales, own, bound).scales
    assert full[:1000].tobytes() == scales.scales[:1000].tobytes()
    assert full[[1001, 1003]].tobytes() == scales.scales[[1000, 1001]].tobytes()
    ends = scales.scales[[501, 981]]
    assert ends.min() <= full[1002, 0] <= ends.max(), "from the calibrated scales alone"


def test_calibrated_timesteps_may_be_fractional() -> None:
    plain = with_schedules(diffusion_table((1,)), [[1, 40.25]])
    table = dataclasses.replace(plain, calibrated=(1.0, 40.25))
    assert table.calibrated_indices == (1, 1000)
    full = interpolate_scales(np.float32([[1], [4]]), table)
    assert full.shape == (1001, 1)
    assert full[[1, 1000], 0].tolist() == [1, 4]
    assert 1 < full[30, 0] < full[39, 0] < 4
    assert full[41:1000].tolist() == [[4]] * 959
    assert scale_origins([1, 30, 40.25], table).calibrated == (1, 40.25)


def test_indices_of_a_scheduler_of_whole_timesteps() -> None:
    scheduler = DDIMScheduler(**SD, steps_offset=1)
    table = timestep_table_of(scheduler, 50, fractional=False)
    assert (table.scheduler_class, table.steps, table.flow_matching) == ("DDIMScheduler", 50, False)
    assert table.scheduler_config["steps_offset"] == 1
    assert table.calibrated == STEPS_OF_50
    assert table.calibrated_indices == STEPS_OF_50
    assert np.array_equal(table.angle, angles_from_alphas(scheduler.alphas_cumprod.numpy()))
    assert (len(table), table.fractional) == (1000, None)
    assert scheduler.num_inference_steps is None, "it is left as it was"


def test_indices_of_a_scheduler_of_fractional_timesteps() -> None:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    with pytest.raises(InputError, match=r"EulerDiscreteScheduler has the fractional timestep 249\.75"):
        timestep_table_of(scheduler, 5, fractional=False)
    table = timestep_table_of(scheduler, 5, fractional=True)
    assert table.calibrated == (0, 249.75, 499.5, 749.25, 999)
    assert table.calibrated_indices == (0, 1, 2, 3, 4), "indices rise with the timestep, whole ones among them"
    scheduler.set_timesteps(5)
    assert timestep_indices(scheduler.timesteps.numpy(), table).tolist() == [4, 3, 2, 1, 0]
    assert len(timestep_table_of(scheduler, 6, fractional=True)) == 6


def test_some_timesteps_of_a_schedule_may_be_calibrated() -> None:
    """Whatever timesteps they are of, they are where they were."""
    table = timestep_table_of(EulerDiscreteScheduler(**SD, timestep_spacing="linspace"), 5, fractional=True)
    ends = dataclasses.replace(table, calibrated=(0.0, 999.0))
    assert ends.calibrated_indices == (0, 4)
    assert ends.timesteps.tolist() == table.timesteps.tolist()
    full = interpolate_scales(np.float32([[1], [4]]), ends)[:, 0]
    assert full[[0, 4]].tolist() == [1, 4]
    assert (np.diff(full) > 0).all()


def test_other_schedules_can_be_bound_to_a_table_of_a_schedules_timesteps() -> None:
    table = timestep_table_of(EulerDiscreteScheduler(**SD, timestep_spacing="linspace"), 5, fractional=True)
    bound = with_schedules(table, [[981, 500.0, 249.7503, 20.5]])
    assert bound.timesteps.tolist() == [0, 20.5, 249.75, 499.5, 500, 749.25, 981, 999]
    assert timestep_indices([500, 249.75], bound).tolist() == [4, 2]
    assert bound.calibrated_indices == (0, 2, 3, 5, 7)


def test_a_schedule_of_fractional_timesteps_alone_comes_behind_the_training_timesteps() -> None:
    table = timestep_table_of(EulerDiscreteScheduler(**SD, use_karras_sigmas=True, steps_offset=1), 6, fractional=True)
    inner = table.timesteps[list(table.calibrated_indices)]
    assert inner.tolist() == sorted(inner)
    whole = timestep_table_of(DDIMScheduler(**SD, steps_offset=1), 50, fractional=True)
    assert (len(whole), whole.calibrated_indices) == (1000, STEPS_OF_50)
    assert whole.fractional is not None
    assert len(whole.fractional) == 0


def test_indices_of_flow_matching_are_those_of_its_schedule() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = timestep_table_of(scheduler, 4, fractional=True)
    scheduler.set_timesteps(4)
    timesteps = np.sort(scheduler.timesteps.double().numpy())
    assert table.flow_matching
    assert table.timesteps == pytest.approx(timesteps, abs=1e-3)
    assert table.calibrated_indices == (0, 1, 2, 3)
    assert angles_of_timesteps(table.timesteps, table) == pytest.approx(np.sort(scheduler.sigmas[:-1]), abs=1e-6)
    assert json_data(timestep_table_of(scheduler, 4, fractional=True)) == json_data(table)


def test_a_timestep_of_flow_matching_without_a_row() -> None:
    table = timestep_table_of(FlowMatchEulerDiscreteScheduler(), 4, fractional=True)
    with pytest.raises(InputError, match=r"timestep 500 .*the engine is not bound to this schedule"):
        timestep_indices([500], table)


def test_schedulers_that_have_no_such_schedule() -> None:
    with pytest.raises(InputError, match="DDIMScheduler cannot do 2000 steps"):
        timestep_table_of(DDIMScheduler(**SD), 2000, fractional=False)
    with pytest.raises(InputError, match="KarrasVeScheduler is neither variance preserving"):
        timestep_table_of(KarrasVeScheduler(), 4, fractional=True)


def test_a_schedule_may_be_bound_beyond_what_is_covered_where_that_is_asked_for() -> None:
    table = with_schedules(diffusion_table((501,)), [[0.5, 998.5]], covered=False)
    assert table.timesteps[1000:].tolist() == [0.5, 998.5]
    assert timestep_indices([998.5], table, covered=False).tolist() == [1001]


def test_a_table_of_fractional_timesteps_comes_back_from_its_file(tmp_path: Path) -> None:
    for name, scheduler in (("flow", FlowMatchEulerDiscreteScheduler()), ("euler", EulerDiscreteScheduler(**SD))):
        table = timestep_table_of(scheduler, 7, fractional=True)
        write_timestep_table(table, tmp_path / name)
        read = read_timestep_table(tmp_path / name)
        assert json_data(read) == json_data(table)
        assert read.timesteps.tobytes() == table.timesteps.tobytes()
        assert read.calibrated_indices == table.calibrated_indices


def test_it_is_said_where_scales_come_from() -> None:
    origins = scale_origins([981, 501.0004, 501, 30.5, 30.5, 0.5, 990], diffusion_table((1, 501, 981)))
    assert origins.calibrated == (501, 501.0004, 981)
    assert origins.interpolated == (30.5,)
    assert origins.clamped == (0.5, 990)
    assert str(origins) == "3 calibrated, 1 interpolated, 2 clamped"


def test_karras_timesteps_that_diffusers_rounds_need_no_indices_of_their_own() -> None:
    scheduler = DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    assert len(with_schedules(diffusion_table(), [scheduler.timesteps.numpy()])) == 1000
