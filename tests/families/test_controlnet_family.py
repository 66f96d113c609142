"""ControlNets as a family of networks: what is calibrated gives diffusers' own residuals, joined to one map."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    discover_layers,
    family_of_config,
    indexed_denoiser,
    load_pipeline,
    network_config,
    new_indexed_denoiser,
    time_table_of,
)
from s2p_deploy.families.controlnet_family import divided_residuals, joined_residuals
from s2p_deploy.families.controlnets import residual_maps
from s2p_deploy.families.registry import controlnet_kind
from s2p_deploy.records import TimestepTable
from tests.small_controlnets import small_controlnet
from tests.small_pipelines import sibling
from tests.tiny_networks import POOLED, TEXT, tiny_sdxl_unet, tiny_unet

if TYPE_CHECKING:
    from diffusers import ModelMixin

MAPS = [(8, 1), (8, 1), (8, 2), (16, 2), (16, 2)]


def taken_apart(network: ModelMixin) -> ModelMixin:
    return controlnet_kind(network_config(network)).without_embedding(copy.deepcopy(network), 8)


@torch.no_grad()
def test_it_gives_diffusers_residuals() -> None:
    network = small_controlnet(tiny_unet(TEXT))
    own = taken_apart(network)
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
    own = taken_apart(network)
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


@torch.no_grad()
def test_so_does_sd3s_without_the_end_of_the_text() -> None:
    network = small_controlnet(load_pipeline(sibling("sd3")).transformer)
    kind, config = controlnet_kind(network_config(network)), network.config
    own = taken_apart(network)
    maps = residual_maps(network_config(own))
    assert maps == [(network.inner_dim, 2)] * 2
    assert kind.sample_channels(network_config(own)) == config.in_channels + network.inner_dim // 4
    embedding = kind.build_embedding(network_config(own))
    embedding.load_state_dict(kind.embedding_of(network).state_dict())
    generator = torch.Generator().manual_seed(0)
    sample, picture = (torch.randn(2, config.in_channels, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 5, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(2, config.pooled_projection_dim, generator=generator)
    timesteps = torch.tensor([7.5, 500.25])
    (expected,) = network(sample, picture, 1.0, text, pooled, timesteps, return_dict=False)
    angle = torch.linspace(0.1, 1.5, 1000).numpy()
    table = TimestepTable("a scheduler", {}, 2, (7.5, 500.25), angle, fractional=timesteps.double().numpy())
    denoiser = indexed_denoiser(own, table)
    given = torch.cat([sample, kind.spread(embedding(picture), network_config(network))], 1)
    joined = denoiser(given, torch.tensor([1000, 1001]), text, pooled)
    for found, tokens in zip(divided_residuals(joined, maps), expected, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)
    names = {layer.name for layer in discover_layers(denoiser)}
    assert {"pos_embed.proj", "controlnet_blocks.0", "controlnet_blocks.1"} <= names
    assert not any(name.startswith("transformer_blocks.1.ff_context") for name in names)
    assert {tap.module for block in kind.blocks(own) for tap in block.leaving} >= {"controlnet_blocks.1"}
    assert new_indexed_denoiser(network_config(own), table).state_dict().keys() == denoiser.state_dict().keys()


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
    config = network_config(taken_apart(small_controlnet(tiny_unet(TEXT)))) | changed
    with pytest.raises(InputError, match=said):
        family_of_config(config)


def test_it_is_built_from_its_configuration() -> None:
    own = taken_apart(small_controlnet(tiny_unet(TEXT)))
    table = time_table_of(own, 10)
    assert table is not None
    built = new_indexed_denoiser(network_config(own), table)
    assert built.state_dict().keys() == indexed_denoiser(own, table).state_dict().keys()
