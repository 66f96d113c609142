from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.quantization.fit_transforms import set_smoothing
from s2p_deploy.calib.quantization.modelopt_start import ModeloptStart, modelopt_start, smoothed_by_modelopt
from s2p_deploy.calib.quantization.scale_start import seen
from s2p_deploy.errors import S2PError
from s2p_deploy.families import HotDenoiser, apply_transforms, discover_sites
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan, TransformSpec

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"
TEXT_K = f"{BLOCK}.attn2.to_k"
PROJ_OUT = "down_blocks.0.attentions.0.proj_out"  # modelopt's own list leaves it out


@pytest.fixture
def plan(hot: HotDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_sites(hot))


@torch.no_grad()
def inputs_of(hot: HotDenoiser, dataset: LatentDataset, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """What sites read at all stored points with both texts."""
    found: dict[str, Tensor] = {}
    hooks = [
        hot.network.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: found.__setitem__(site, args[0])
        )
        for site in sites
    ]
    hot(*seen(dataset, np.arange(len(dataset.rows))))
    for hook in hooks:
        hook.remove()
    return found


def test_default_scales_are_the_largest_magnitudes(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    start = modelopt_start(hot, plan, dataset, "modelopt", silent)
    assert capsys.readouterr().out == ""
    assert start.smoothing == {}
    grids = start.grids(plan, 6)
    assert (grids.offsets, grids.relaxed) == (None, None)
    assert bool((grids.scales == grids.scales[0]).all())
    assert grids.scales.shape == (6, len(plan.act_points))
    for site, x in inputs_of(hot, dataset, (TO_Q, PROJ_OUT)).items():
        scale = grids.scales[0, plan.point_names().index(site)]
        torch.testing.assert_close(scale, x.abs().max() / 127, rtol=1e-4, atol=0)
    weight_scales = start.weight_scales(plan)
    assert set(weight_scales) == {site.site for site in plan.sites if site.weights != "none"}
    for site, largest in (("conv_in", 127), (PROJ_OUT, 7), (TEXT_K, 7)):
        weight = hot.network.get_submodule(site).weight
        expected = weight.abs().flatten(1).amax(1) / largest
        assert weight_scales[site].shape == (len(weight),) + (1,) * (weight.dim() - 1)
        torch.testing.assert_close(weight_scales[site].flatten(), expected)


def test_sites_that_stay_in_floating_point_are_left_out(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    start = modelopt_start(hot, plan, dataset, "modelopt", silent)
    assert set(start.act_peaks) == {site.site for site in plan.sites if site.act_point is not None}
    assert {"conv_in", TEXT_K}.isdisjoint(start.act_peaks)


def test_a_point_takes_the_largest_of_its_sites(plan: PrecisionPlan) -> None:
    peaks = {site.site: torch.tensor(127.0) for site in plan.sites}
    start = ModeloptStart({}, peaks | {TO_K: torch.tensor(254.0)}, {})
    scales = start.grids(plan, 1).scales[0]
    assert {name: float(scale) for name, scale in zip(plan.point_names(), scales, strict=True)} == dict.fromkeys(
        plan.point_names(), 1.0
    ) | {TO_Q: 2.0}


def test_smoothquant_can_be_applied(
    hot: HotDenoiser, recipe: Recipe, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    start = modelopt_start(hot, plan, dataset, "modelopt_smoothquant", silent)
    smoothed = smoothed_by_modelopt(plan)
    assert set(start.smoothing) == set(smoothed)
    assert TEXT_K not in smoothed
    inputs = inputs_of(hot, dataset, smoothed)
    for site in smoothed:
        factor, weight = start.smoothing[site], hot.network.get_submodule(site).weight
        torch.testing.assert_close(start.act_peaks[site], (inputs[site] / factor).abs().max(), rtol=1e-4, atol=0)
        torch.testing.assert_close(start.weight_peaks[site], (weight * factor).abs().amax(1, keepdim=True))
    sample = seen(dataset, np.arange(3))
    with torch.no_grad():
        expected = hot(*sample)
        apply_transforms(hot, TransformSpec(smoothed=smoothed))
        set_smoothing(hot, start.smoothing)
        torch.testing.assert_close(hot(*sample), expected, rtol=1e-4, atol=1e-5)
    renamed = plan_from_recipe(recipe, discover_sites(hot))
    assert set(start.weight_scales(renamed)) == {site.site for site in renamed.sites}
    columns = {name: start.grids(renamed, 2).scales[1, i] for i, name in enumerate(renamed.point_names())}
    for site in (TO_Q, TO_K):  # one tensor before, a factor each now
        torch.testing.assert_close(columns[f"{site}.layer"], start.act_peaks[site] / 127)


@pytest.mark.parametrize("calibrator", ["modelopt", "modelopt_smoothquant"])
def test_the_denoiser_and_torch_stay_as_they_were(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, calibrator: str
) -> None:
    before = copy.deepcopy(hot.state_dict())
    kinds = [type(module) for module in hot.modules()]
    attention = torch.nn.functional.scaled_dot_product_attention
    sample = seen(dataset, np.arange(3))
    with torch.no_grad():
        expected = hot(*sample)
        modelopt_start(hot, plan, dataset, calibrator, silent)  # type: ignore[arg-type]
        assert torch.equal(hot(*sample), expected)
    assert [type(module) for module in hot.modules()] == kinds
    assert torch.nn.functional.scaled_dot_product_attention is attention
    after = hot.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_stored_point_is_reported(hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset) -> None:
    told: list[tuple[str, int, int]] = []
    modelopt_start(hot, plan, dataset, "modelopt", lambda *where: told.append(where))
    assert told[-1] == ("modelopt", 2 * len(dataset.rows), 2 * len(dataset.rows))


def test_a_broken_pipeline_is_named(hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset) -> None:
    with torch.no_grad():
        hot.network.get_submodule(TO_Q).weight.fill_(torch.nan)
    with pytest.raises(S2PError, match="nvidia-modelopt found an activation that is not finite") as caught:
        modelopt_start(hot, plan, dataset, "modelopt", silent)
    assert "\n" not in str(caught.value)
