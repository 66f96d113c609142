from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    block_names,
    discover_sites,
    hot_denoiser_from_unet,
    new_hot_denoiser,
    time_table_from_unet,
)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 5, 12, generator=generator)


@torch.no_grad()
def test_the_table_draws_what_the_time_path_drew(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_from_unet(tiny_unet, 1000)
    sample, text = inputs(3)
    rows = torch.tensor([0, 999, 421])  # samples of one batch on different rows
    expected = tiny_unet(sample, rows, text).sample
    hot = hot_denoiser_from_unet(copy.deepcopy(tiny_unet), table)
    assert torch.allclose(hot(sample, rows, text), expected, atol=1e-5)
    assert not torch.allclose(hot(sample, rows.flip(0), text), expected, atol=1e-3), "the row matters"


def test_the_weights_of_the_time_path_are_gone(tiny_unet: UNet2DConditionModel) -> None:
    before = sum(parameter.numel() for parameter in tiny_unet.parameters())
    time_path = sum(p.numel() for name, p in tiny_unet.named_parameters() if "time_emb" in name)
    hot = hot_denoiser_from_unet(tiny_unet, time_table_from_unet(tiny_unet, 10))
    assert sum(parameter.numel() for parameter in hot.parameters()) == before - time_path
    assert not any("time" in name for name, _ in hot.named_parameters())
    assert not any("table" in name for name in hot.state_dict())


@torch.no_grad()
def test_table_columns_by_hand(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_from_unet(tiny_unet, 20)
    assert table.projections.shape == (20, sum(stop - start for start, stop in table.slices.values()))
    resnet = tiny_unet.get_submodule("mid_block.resnets.0")
    start, stop = table.slices["mid_block.resnets.0"]
    embedding = tiny_unet.time_embedding(tiny_unet.time_proj(torch.tensor([7])))
    expected = resnet.time_emb_proj(torch.nn.functional.silu(embedding))[0].numpy()
    assert table.projections[7, start:stop] == pytest.approx(expected, abs=1e-6)
    ends = [0, *(stop for _, stop in table.slices.values())]
    assert [start for start, _ in table.slices.values()] == ends[:-1], "slices stand side by side"


def test_a_denoiser_whose_time_features_depend_on_the_prompt_is_refused(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(InputError, match="SDXL"):
        time_table_from_unet(tiny_unet, 10)


@torch.no_grad()
def test_a_new_denoiser_takes_the_weights_of_a_stored_one(tiny_unet: UNet2DConditionModel) -> None:
    config, table = dict(tiny_unet.config), time_table_from_unet(tiny_unet, 10)
    stored = hot_denoiser_from_unet(tiny_unet, table)
    fresh = new_hot_denoiser(config, table).eval()
    fresh.load_state_dict(stored.state_dict())
    sample, text = inputs(2)
    rows = torch.tensor([3, 9])
    assert torch.equal(fresh(sample, rows, text), stored(sample, rows, text))


def test_sites_are_every_conv_and_linear_that_runs(tiny_unet: UNet2DConditionModel) -> None:
    hot = hot_denoiser_from_unet(tiny_unet, time_table_from_unet(tiny_unet, 10))
    sites = {site.name: site for site in discover_sites(hot)}
    layers = {
        name for name, module in hot.unet.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert set(sites) == layers
    assert next(iter(sites)) == "conv_in"
    assert list(sites)[-1] == "conv_out"
    assert {sites[name].op for name in ("conv_in", "conv_out")} == {"conv"}


def test_sites_that_read_one_tensor_share_its_number(tiny_unet: UNet2DConditionModel) -> None:
    hot = hot_denoiser_from_unet(tiny_unet, time_table_from_unet(tiny_unet, 10))
    sites = {site.name: site for site in discover_sites(hot)}
    block = "mid_block.attentions.0.transformer_blocks.0"
    own = {sites[f"{block}.attn1.{name}"].tensor for name in ("to_q", "to_k", "to_v")}
    cross = {sites[f"{block}.attn2.{name}"].tensor for name in ("to_k", "to_v")}
    assert len(own) == len(cross) == 1
    assert own != cross
    assert sites[f"{block}.attn2.to_q"].tensor not in own | cross
    reads_text = {name for name, site in sites.items() if site.reads_text}
    assert reads_text == {name for name in sites if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len({sites[name].tensor for name in reads_text}) == 1, "all of them read the same text"


def test_looking_for_sites_leaves_no_hook(tiny_unet: UNet2DConditionModel) -> None:
    hot = hot_denoiser_from_unet(tiny_unet, time_table_from_unet(tiny_unet, 10))
    assert discover_sites(hot) == discover_sites(hot, tokens=3)
    assert not any(module._forward_pre_hooks for module in hot.modules())


def test_blocks_have_one_activation_in_and_one_out(tiny_unet: UNet2DConditionModel) -> None:
    hot = hot_denoiser_from_unet(tiny_unet, time_table_from_unet(tiny_unet, 10))
    names = block_names(hot)
    assert "conv_in" in names
    assert {
        "down_blocks.0.resnets.0",
        "mid_block.attentions.0",
        "down_blocks.0.downsamplers.0",
        "up_blocks.0.upsamplers.0",
    } <= set(names)
    assert not any("transformer_blocks" in name for name in names)
