from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from s2p_deploy.families import (
    HotDenoiser,
    discover_sites,
    hot_denoiser,
    latent_shape,
    latent_shape_of,
    network_config,
    zero_inputs,
)
from s2p_deploy.records import TimestepTable

TABLE = TimestepTable("a scheduler", {}, 2, (0.0, 9.0), np.linspace(0, 1, 10))


@pytest.fixture
def hot(network: torch.nn.Module) -> HotDenoiser:
    return hot_denoiser(network, TABLE)


def test_sites_are_every_conv_and_linear_that_runs(hot: HotDenoiser) -> None:
    sites = {site.name: site for site in discover_sites(hot)}
    modules = dict(hot.network.named_modules())
    layers = {name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    assert set(sites) == layers
    assert all((site.op == "conv") == isinstance(modules[name], torch.nn.Conv2d) for name, site in sites.items())


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("tiny_unet", "conv_in", "conv_out"),
        ("sdxl_unet", "conv_in", "conv_out"),
        ("mmdit", "pos_embed.proj", "proj_out"),
    ],
)
def test_the_first_reads_the_latents_and_the_last_is_marked(
    request: pytest.FixtureRequest, name: str, first: str, last: str
) -> None:
    sites = discover_sites(hot_denoiser(request.getfixturevalue(name), TABLE))
    assert [site.name for site in sites if site.reads == "sample"] == [sites[0].name] == [first]
    assert [site.name for site in sites if site.last] == [sites[-1].name] == [last]


def test_sites_that_read_one_tensor_share_its_number(tiny_unet: UNet2DConditionModel) -> None:
    sites = {site.name: site for site in discover_sites(hot_denoiser(tiny_unet, TABLE))}
    block = "mid_block.attentions.0.transformer_blocks.0"
    own = {sites[f"{block}.attn1.{name}"].tensor for name in ("to_q", "to_k", "to_v")}
    cross = {sites[f"{block}.attn2.{name}"].tensor for name in ("to_k", "to_v")}
    assert len(own) == len(cross) == 1
    assert own != cross
    assert sites[f"{block}.attn2.to_q"].tensor not in own | cross
    reads_text = {name for name, site in sites.items() if site.reads == "text"}
    assert reads_text == {name for name in sites if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len({sites[name].tensor for name in reads_text}) == 1, "all of them read the same text"


def test_joint_attention_reads_image_and_text_apart(mmdit: SD3Transformer2DModel) -> None:
    sites = {site.name: site for site in discover_sites(hot_denoiser(mmdit, TABLE))}
    attention = "transformer_blocks.0.attn"
    image = {sites[f"{attention}.{name}"].tensor for name in ("to_q", "to_k", "to_v")}
    text = {sites[f"{attention}.{name}"].tensor for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
    assert len(image) == len(text) == 1
    assert image != text
    assert [name for name, site in sites.items() if site.reads == "text"] == ["context_embedder"], (
        "behind its first modulation the text depends on the timestep"
    )


def test_looking_for_sites_leaves_no_hook(hot: HotDenoiser) -> None:
    assert discover_sites(hot) == discover_sites(hot, tokens=3)
    assert not any(module._forward_pre_hooks for module in hot.modules())


def test_zero_inputs_are_what_a_denoiser_takes(hot: HotDenoiser) -> None:
    given = zero_inputs(hot, tokens=3, batch=2)
    assert latent_shape(hot) == (4, 8, 8)
    assert hot(*given.arguments()).shape == (2, 4, 8, 8)


def test_latents_that_are_no_square(tiny_unet: UNet2DConditionModel) -> None:
    assert latent_shape_of(network_config(tiny_unet) | {"sample_size": [6, 10]}) == (4, 6, 10)
