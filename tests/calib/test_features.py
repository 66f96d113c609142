from __future__ import annotations

import numpy as np
import pytest
import torch

from s2p_deploy.calib.losses import feature_loss, feature_targets, tapped
from s2p_deploy.families import IndexedDenoiser, indexed_denoiser
from s2p_deploy.recipe import Features, Recipe
from s2p_deploy.records import PrecisionPlan, TimestepTable
from tests.tiny_networks import POOLED, TEXT, TOKENS, tiny_mmdit

NO_PLAN = PrecisionPlan((), ())


def test_both_forms_by_hand() -> None:
    # Squares of the teacher per sample: 4 and 16, errors 1 and 4; the second target is zero in the teacher.
    wanted = {"a": torch.tensor([[2.0, 0.0], [0.0, 4.0]]), "b": torch.zeros(2, 1)}
    found = {"a": torch.tensor([[2.0, 1.0], [0.0, 2.0]]), "b": torch.tensor([[1e-3], [0.0]])}
    relative = ((1 / 4 + 4 / 16) / 2 + (1e-6 / 1e-6 + 0) / 2) / 2
    assert float(feature_loss(found, wanted, relative=True)) == pytest.approx(relative)
    assert float(feature_loss(found, wanted, relative=False)) == pytest.approx((5 / 4 + 0.5e-6) / 2)


def test_blocks_are_the_three_kinds(float_denoiser: IndexedDenoiser, recipe: Recipe) -> None:
    training = recipe.training.model_copy(update={"features": Features(targets="blocks")})
    expected = {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert set(feature_targets(training, float_denoiser, NO_PLAN)) == expected
    assert feature_targets(recipe.training, float_denoiser, NO_PLAN) == ()


@torch.no_grad()
def test_of_a_joint_block_the_image_is_tapped(recipe: Recipe) -> None:
    timesteps = np.asarray([100.0, 900.0])
    levels = np.linspace(0, 1, 1001)
    table = TimestepTable("a scheduler", {}, 2, (100.0, 900.0), levels, flow_matching=True, fractional=timesteps)
    float_denoiser = indexed_denoiser(tiny_mmdit(), table).eval()
    training = recipe.training.model_copy(update={"features": Features(targets="blocks")})
    targets = feature_targets(training, float_denoiser, NO_PLAN)
    assert targets == tuple(f"transformer_blocks.{number}" for number in range(3))
    seen: list[torch.Tensor] = []
    float_denoiser.network.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with tapped(float_denoiser, targets) as found:
        float_denoiser(
            torch.randn(2, 4, 8, 8), torch.tensor([0, 1]), torch.randn(2, TOKENS, TEXT), torch.randn(2, POOLED)
        )
    assert {value.shape for value in found.values()} == {(2, 16, 16)}, "patches by width, not tokens"
    assert found["transformer_blocks.2"] is seen[0]


@torch.no_grad()
def test_what_is_tapped_is_what_goes_on(float_denoiser: IndexedDenoiser) -> None:
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 3, 128)
    with tapped(float_denoiser, ("down_blocks.0", "up_blocks.1", "conv_out")) as found:
        output = float_denoiser(*inputs)
    assert torch.equal(found["conv_out"], output)
    assert found["down_blocks.0"].shape == (2, 8, 4, 4)  # of the block's tuple, its own output
    before = dict(found)
    float_denoiser(*(2 * value for value in inputs))
    assert all(found[name] is value for name, value in before.items())
