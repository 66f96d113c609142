"""ControlNets as a family of networks: what is calibrated gives diffusers' own residuals, joined to one map."""

from __future__ import annotations

import copy

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    discover_layers,
    family_of_config,
    indexed_denoiser,
    network_config,
    new_indexed_denoiser,
    time_table_of,
)
from s2p_deploy.families.controlnet_family import (
    divided_residuals,
    joined_residuals,
    residual_maps,
    without_embedding,
)
from s2p_deploy.records import TimestepTable
from tests.small_controlnets import small_controlnet
from tests.tiny_networks import POOLED, TEXT, tiny_sdxl_unet, tiny_unet

MAPS = [(8, 1), (8, 1), (8, 2), (16, 2), (16, 2)]


@torch.no_grad()
def test_it_gives_diffusers_residuals() -> None:
    network = small_controlnet(tiny_unet(TEXT))
    own = without_embedding(copy.deepcopy(network), 8)
    config = network_config(own)
    assert residual_maps(config) == MAPS
    table = time_table_of(own, 1000)
    assert table is not None
    denoiser = indexed_denoiser(own, table)
    generator = torch.Generator().manual_seed(0)
    sample, text, picture = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, TEXT), (2, 3, 64, 64))
    )
    index = torch.tensor([7, 500])
    down, middle = network(sample, index, text, picture, return_dict=False)
    joined = denoiser(torch.cat([sample, network.controlnet_cond_embedding(picture)], 1), index, text)
    assert joined.shape == (2, 26, 8, 8)
    for found, expected in zip(divided_residuals(joined, MAPS), (*down, middle), strict=True):
        torch.testing.assert_close(found, expected)
    names = [layer.name for layer in discover_layers(denoiser)]
    assert names[0] == "conv_in"
    assert names[-1] == "controlnet_mid_block"


@torch.no_grad()
def test_so_does_sdxls() -> None:
    network = small_controlnet(tiny_sdxl_unet())
    own = without_embedding(copy.deepcopy(network), 8)
    assert family_of_config(network_config(own)).added_width(network_config(own)) == POOLED + 6
    timesteps = torch.tensor([37.5, 900.25])
    table = TimestepTable("a scheduler", {}, 2, (37.5, 900.25), torch.linspace(0.1, 1.5, 1000).numpy())
    table = TimestepTable("a scheduler", {}, 2, (37.5, 900.25), table.angle, fractional=timesteps.double().numpy())
    denoiser = indexed_denoiser(own, table)
    sample, text, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TEXT), torch.rand(2, 3, 64, 64)
    pooled, ids = torch.randn(2, POOLED), torch.full((2, 6), 64.0)
    down, middle = network(
        sample,
        timesteps,
        text,
        picture,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        return_dict=False,
    )
    given = torch.cat([sample, network.controlnet_cond_embedding(picture)], 1)
    joined = denoiser(given, torch.tensor([1000, 1001]), text, torch.cat([pooled, ids], 1))
    for found, expected in zip(divided_residuals(joined, MAPS), (*down, middle), strict=True):
        torch.testing.assert_close(found, expected)


def test_joined_maps_are_divided_again() -> None:
    maps = [(3, 1), (8, 2), (16, 4)]
    residuals = [torch.randn(2, channels, 8 // factor, 12 // factor) for channels, factor in maps]
    joined = joined_residuals(residuals, [factor for _, factor in maps])
    assert joined.shape == (2, 3 + 2 + 1, 8, 12)
    for found, expected in zip(divided_residuals(joined, maps), residuals, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_out_channels": (8, 18)}, "18 channels at level 1"),
        ({"num_class_embeds": 4}, "num_class_embeds=4"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"sample_size": None}, "sample_size=None"),
    ],
)
def test_what_no_engine_can_compute_is_refused(changed: dict[str, object], said: str) -> None:
    config = network_config(without_embedding(small_controlnet(tiny_unet(TEXT)), 8)) | changed
    with pytest.raises(InputError, match=said):
        family_of_config(config)


def test_it_is_built_from_its_configuration() -> None:
    own = without_embedding(small_controlnet(tiny_unet(TEXT)), 8)
    table = time_table_of(own, 10)
    assert table is not None
    built = new_indexed_denoiser(network_config(own), table)
    assert built.state_dict().keys() == indexed_denoiser(own, table).state_dict().keys()
