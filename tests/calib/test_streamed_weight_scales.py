from __future__ import annotations

import weakref

import pytest
import torch

from s2p_deploy.calib.quantized_denoiser import WeightQuantizer
from s2p_deploy.calib.streaming import streamed_weight_scales
from s2p_deploy.context import silent
from s2p_deploy.numerics import INT4, least_squares_weight_scale, max_weight_scale
from s2p_deploy.recipe import Scales
from s2p_deploy.records import LayerPlan, PrecisionPlan


@pytest.mark.parametrize("how", ["least_squares", "max"])
def test_scales_are_those_that_other_calibrations_start_from(how: str) -> None:
    weight = torch.randn((7, 33, 3, 3), generator=torch.Generator().manual_seed(0)).half()
    plan = PrecisionPlan(
        (LayerPlan("conv", "conv", "int4", None, ""), LayerPlan("other", "conv", "none", None, "")), ()
    )
    scale_of = least_squares_weight_scale if how == "least_squares" else max_weight_scale
    found = streamed_weight_scales({"network.conv.weight": weight}.__getitem__, plan, Scales(weights=how), silent)
    assert list(found) == ["conv"]
    assert torch.equal(found["conv"], WeightQuantizer(scale_of(weight, INT4), INT4).scale.detach())


def test_one_weight_is_held_at_a_time() -> None:
    layers = [f"conv{number}" for number in range(3)]
    read: list[weakref.ref[torch.Tensor]] = []
    told: list[tuple[int, int]] = []

    def fresh(_name: str) -> torch.Tensor:
        assert [weight for weight in read if weight() is not None] == []
        weight = torch.ones(4, 2, 3, 3)
        read.append(weakref.ref(weight))
        return weight

    plan = PrecisionPlan(tuple(LayerPlan(layer, "conv", "int8", None, "") for layer in layers), ())
    found = streamed_weight_scales(fresh, plan, Scales(), lambda _stage, done, total: told.append((done, total)))
    assert list(found) == layers
    assert told == [(1, 3), (2, 3), (3, 3)]
