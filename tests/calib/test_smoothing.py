from __future__ import annotations

import copy

import pytest
import torch

from s2p_deploy.calib.modelopt import set_smoothing
from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser, SmoothedLinear, apply_transforms, module_of_type
from s2p_deploy.records import LatentDataset, TransformSpec

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY = (f"{BLOCK}.attn1.to_{name}" for name in "qk")


@torch.no_grad()
def draw(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> torch.Tensor:
    sample = torch.from_numpy(dataset.latents[:4]).float()
    texts = torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[:4]]]).float()
    return float_denoiser(sample, torch.from_numpy(dataset.timestep_indices[:4]), texts)


def test_smoothing_factors_from_elsewhere(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    plain = copy.deepcopy(float_denoiser)
    apply_transforms(float_denoiser, TransformSpec(smoothed=(QUERY,)))
    factor = torch.linspace(0.5, 2.0, 16)
    set_smoothing(float_denoiser, {QUERY: factor})
    module, weight = module_of_type(float_denoiser, QUERY, SmoothedLinear), plain.network.get_submodule(QUERY).weight
    assert torch.equal(module.factor, factor)
    assert torch.allclose(module.layer.weight, weight * factor)
    assert torch.allclose(draw(float_denoiser, dataset), draw(plain, dataset), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "factor", "message"),
    [
        (KEY, torch.ones(16), "to_k is a Linear, not a SmoothedLinear"),
        ("nowhere", torch.ones(16), "nowhere is not in this denoiser"),
        (QUERY, torch.ones(15), r"to_q must be 16 finite numbers above zero, got \[15\]"),
        (QUERY, torch.zeros(16), "minimum 0.0"),
        (QUERY, torch.full((16,), torch.inf), "minimum inf"),
    ],
)
def test_wrong_factors(float_denoiser: IndexedDenoiser, path: str, factor: torch.Tensor, message: str) -> None:
    apply_transforms(float_denoiser, TransformSpec(smoothed=(QUERY,)))
    with pytest.raises(InputError, match=message):
        set_smoothing(float_denoiser, {path: factor})
