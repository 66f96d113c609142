from __future__ import annotations

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser, SmoothedLinear, discover_layers
from s2p_research.transforms import LowRankLinear, apply_low_rank

TEXT_KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@torch.no_grad()
def test_the_branch_holds_the_best_approximation_of_its_rank() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    weight, x = linear.weight.detach().clone(), torch.randn(4, 6)
    expected = linear(x)
    low_rank = LowRankLinear(linear, 2)
    low_rank.decompose()
    values = torch.linalg.svdvals(weight)
    assert low_rank.residual.weight.norm() == pytest.approx(float(values[2:].norm()), rel=1e-5)  # Eckart and Young
    assert torch.linalg.svdvals(low_rank.up.weight @ low_rank.down.weight)[2:].max() < 1e-6
    assert torch.allclose(low_rank(x), expected, atol=1e-6)
    low_rank.decompose()
    assert torch.allclose(low_rank.whole_weight(), weight, atol=1e-6), "a second time changes nothing"


@torch.no_grad()
def test_a_factor_behind_which_a_branch_stands() -> None:
    torch.manual_seed(0)
    smoothed = SmoothedLinear(torch.nn.Linear(6, 5))
    x = torch.randn(4, 6)
    expected, weight = smoothed(x), smoothed.layer.weight.clone()
    smoothed.set_factor(torch.rand(6) + 0.1)
    smoothed.layer = LowRankLinear(smoothed.layer, 2)
    smoothed.layer.decompose()
    assert torch.allclose(smoothed(x), expected, atol=1e-5)
    assert torch.allclose(smoothed.layer.whole_weight() / smoothed.factor, weight, atol=1e-5)


def test_a_branch_of_a_text_layer_reads_the_text(float_denoiser: IndexedDenoiser) -> None:
    apply_low_rank(float_denoiser, {TEXT_KEY: 2})
    layers = {layer.name: layer for layer in discover_layers(float_denoiser)}
    assert all(layers[f"{TEXT_KEY}.{part}"].reads == "text" for part in ("residual", "down"))


@pytest.mark.parametrize(
    ("low_rank", "message"),
    [
        ({TEXT_KEY: 17}, "too few for a branch of rank 17"),
        ({TEXT_KEY: 0}, "rank 0"),
        ({"conv_in": 2}, "conv_in is a Conv2d, not a Linear"),
    ],
)
def test_ranks_of_another_denoiser(float_denoiser: IndexedDenoiser, low_rank: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_low_rank(float_denoiser, low_rank)
