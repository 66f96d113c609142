from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    Tap,
    TimePath,
    apply_transforms,
    family_of,
    indexed_denoiser,
    network_config,
    time_table_of,
)
from s2p_deploy.families.unet import size_ids
from s2p_deploy.records import TransformSpec
from tests.tiny_networks import POOLED, TEXT, TOKENS, tiny_refiner_unet, tiny_sdxl_unet, tiny_unet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def test_widths_of_the_conditions(tiny_unet: UNet2DConditionModel, sdxl_unet: UNet2DConditionModel) -> None:
    kind = family_of(tiny_unet)
    assert kind.text_width(network_config(tiny_unet)) == 12
    assert kind.text_width(network_config(sdxl_unet)) == TEXT
    assert kind.added_width(network_config(tiny_unet)) == 0
    assert kind.added_width(network_config(sdxl_unet)) == POOLED + 6


@torch.no_grad()
def test_sdxl_is_called_as_its_pipeline_calls_it(sdxl_unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 8, 8), (2, TOKENS, TEXT), (2, POOLED), (2, 6))
    sample, states, pooled, ids = (torch.randn(shape, generator=generator) for shape in shapes)
    conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    expected = sdxl_unet(sample, 37.5, states, **conditions).sample
    kind = family_of(sdxl_unet)
    added = kind.added_cond(conditions)
    assert torch.equal(kind.predict(sdxl_unet, sample, torch.full((2,), 37.5), states, added), expected)


def test_added_conditions_are_taken_from_what_a_pipeline_passes(sdxl_unet: UNet2DConditionModel) -> None:
    kind = family_of(sdxl_unet)
    assert kind.added_cond({}) is None
    assert kind.added_cond({"added_cond_kwargs": None}) is None
    assert kind.added_cond({"added_cond_kwargs": {"time_ids": torch.ones(1, 6)}}) is None
    given = {"text_embeds": torch.ones(1, 2, dtype=torch.float16), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    with pytest.raises(InputError, match="cannot take image_embeds"):  # an IP-Adapter's
        kind.added_cond({"added_cond_kwargs": given | {"image_embeds": torch.ones(1, 3)}})
    found = kind.added_cond({"added_cond_kwargs": given})
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, 1, 64, 64, 0, 0, 64, 64]]


@torch.no_grad()
def test_the_embedding_of_a_guidance_scale_by_hand() -> None:
    """LCM: the condition passes a layer of its own into the MLP of the timestep."""
    unet = tiny_unet(cross_attention_dim=12, time_cond_proj_dim=6).eval()
    condition = torch.linspace(-1, 1, 6)[None]
    hidden = unet.time_proj(torch.tensor([12.0])) + unet.time_embedding.cond_proj(condition)
    embedding = unet.time_embedding.linear_2(torch.nn.functional.silu(unet.time_embedding.linear_1(hidden)))
    expected = unet.mid_block.resnets[0].time_emb_proj(torch.nn.functional.silu(embedding))
    path = TimePath(unet)
    start, stop = path.slices["mid_block.resnets.0"]
    assert torch.allclose(path(torch.tensor([12.0]), condition)[:, start:stop], expected, atol=1e-6)
    assert time_table_of(unet, 10) is None, "there is no table: the features depend on the guidance too"
    assert family_of(unet).added_cond({"timestep_cond": condition}).tolist() == condition.tolist()


def test_what_depends_on_the_guidance_follows_pooled_text_and_ids() -> None:
    unet = tiny_sdxl_unet(time_cond_proj_dim=3)
    given = {"text_embeds": torch.ones(1, POOLED), "time_ids": torch.full((1, 6), 2.0)}
    found = family_of(unet).added_cond({"added_cond_kwargs": given, "timestep_cond": torch.full((1, 3), 3.0)})
    assert found.tolist() == [[1.0] * POOLED + [2.0] * 6 + [3.0] * 3]
    assert family_of(unet).added_width(network_config(unet)) == POOLED + 6 + 3


def test_a_refiner_has_five_ids() -> None:
    assert size_ids(network_config(tiny_refiner_unet())) == 5
    assert size_ids(network_config(tiny_sdxl_unet())) == 6
    assert family_of(tiny_refiner_unet()).added_width(network_config(tiny_refiner_unet())) == TEXT + 5


@torch.no_grad()
def test_the_embedding_of_sdxl_by_hand(sdxl_unet: UNet2DConditionModel) -> None:
    pooled, ids = torch.randn(1, POOLED), torch.tensor([[64.0, 48.0, 8.0, 0.0, 32.0, 16.0]])
    sizes = sdxl_unet.add_time_proj(ids[0]).flatten()[None]
    embedding = sdxl_unet.time_embedding(sdxl_unet.time_proj(torch.tensor([12.0])))
    embedding += sdxl_unet.add_embedding(torch.cat([pooled, sizes], 1))
    projection = sdxl_unet.mid_block.resnets[0].time_emb_proj
    expected = projection(torch.nn.functional.silu(embedding))
    path = TimePath(sdxl_unet)
    start, stop = path.slices["mid_block.resnets.0"]
    found = path(torch.tensor([12.0]), torch.cat([pooled, ids], 1))[:, start:stop]
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_resnet_that_scales_by_time_is_refused_by_name(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.mid_block.resnets[1].time_embedding_norm = "scale_shift"
    with pytest.raises(InputError, match=r"mid_block\.resnets\.1 uses time_embedding_norm='scale_shift'"):
        time_table_of(tiny_unet, 10)


@torch.no_grad()
def test_resnets_that_take_the_embedding_as_it_is(tiny_unet: UNet2DConditionModel) -> None:
    config = network_config(tiny_unet) | {"resnet_skip_time_act": True}
    unet = family_of(tiny_unet).build(config).eval()
    sample, text, rows = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS, TEXT), torch.tensor([3, 9])
    expected = unet(sample, rows, text).sample
    assert torch.allclose(indexed_denoiser(unet, time_table_of(unet, 10))(sample, rows, text), expected, atol=1e-5)


def test_blocks_have_one_activation_in_and_one_out(tiny_unet: UNet2DConditionModel) -> None:
    float_denoiser = indexed_denoiser(tiny_unet, time_table_of(tiny_unet, 10))
    blocks = {block.name: block for block in float_denoiser.family.blocks(float_denoiser.network)}
    assert next(iter(blocks)) == "conv_in"
    assert {
        "down_blocks.0.resnets.0",
        "mid_block.attentions.0",
        "down_blocks.0.downsamplers.0",
        "up_blocks.0.upsamplers.0",
    } <= set(blocks)
    assert not any("transformer_blocks" in name for name in blocks)
    for name in blocks.keys() - {"output"}:
        assert (blocks[name].modules, blocks[name].entering) == ((name,), (Tap(name, "input"),))
        assert blocks[name].leaving == (Tap(name, "output"),)


def test_the_tail_is_the_last_block(tiny_unet: UNet2DConditionModel) -> None:
    tail = family_of(tiny_unet).blocks(tiny_unet)[-1]
    assert (tail.name, tail.modules) == ("output", ("conv_norm_out", "conv_act", "conv_out"))
    assert (tail.entering, tail.leaving) == ((Tap("conv_norm_out", "input"),), (Tap("conv_out", "output"),))


def test_distilled_blocks_hand_on_the_image_first(tiny_unet: UNet2DConditionModel) -> None:
    kind = family_of(tiny_unet)
    distilled = [name for name, _ in tiny_unet.named_modules() if kind.distilled.fullmatch(name)]
    assert distilled == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "mid_block"]
    assert kind.image_output == 0


def test_shortcuts_of_the_tiny_denoiser(tiny_unet: UNet2DConditionModel) -> None:
    # h: 16 from the middle, 16, then 16 from the block below, 8; conv_shortcut stands where channel counts differ.
    assert family_of(tiny_unet).split_shortcuts(tiny_unet) == {
        f"up_blocks.{block}.resnets.{resnet}.{conv}": channels
        for block, resnet, channels in ((0, 0, 16), (0, 1, 16), (1, 0, 16), (1, 1, 8))
        for conv in ("conv1", "conv_shortcut")
    }


def test_the_head_of_a_split_shortcut_reads_h_and_the_skip_the_rest(tiny_unet: UNet2DConditionModel) -> None:
    """Watches what is concatenated: the output of the module before, and one of the way down."""
    float_denoiser = indexed_denoiser(tiny_unet, time_table_of(tiny_unet, 10)).eval()
    apply_transforms(float_denoiser, TransformSpec(float_denoiser.family.split_shortcuts(float_denoiser.network)))
    seen: dict[str, torch.Tensor] = {}
    before = {
        "up_blocks.0.resnets.0": "mid_block",
        "up_blocks.0.resnets.1": "up_blocks.0.resnets.0",
        "up_blocks.1.resnets.0": "up_blocks.0",
        "up_blocks.1.resnets.1": "up_blocks.1.attentions.0",
    }
    for path in before.values():
        float_denoiser.network.get_submodule(path).register_forward_hook(
            lambda _, __, output, path=path: seen.update({path: output if torch.is_tensor(output) else output[0]})
        )
    for path in before:
        float_denoiser.network.get_submodule(f"{path}.conv_shortcut.head").register_forward_pre_hook(
            lambda _, args, path=path: seen.update({f"{path}.head": args[0]})
        )
    float_denoiser(torch.randn(2, 4, 8, 8), torch.tensor([3, 9]), torch.randn(2, TOKENS, TEXT))
    for path, source in before.items():
        assert torch.equal(seen[f"{path}.head"], seen[source]), path
