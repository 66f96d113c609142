from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from s2p_deploy.families import (
    IndexedDenoiser,
    discover_layers,
    indexed_denoiser,
    latent_shape,
    latent_shape_of,
    layers_behind_norms,
    network_config,
    zero_inputs,
)
from s2p_deploy.records import TimestepTable

TABLE = TimestepTable("a scheduler", {}, 2, (0.0, 9.0), np.linspace(0, 1, 10))


@pytest.fixture
def float_denoiser(network: torch.nn.Module) -> IndexedDenoiser:
    return indexed_denoiser(network, TABLE)


def test_layers_are_every_conv_and_linear_that_runs(float_denoiser: IndexedDenoiser) -> None:
    layers = {layer.name: layer for layer in discover_layers(float_denoiser)}
    modules = dict(float_denoiser.network.named_modules())
    assert set(layers) == {
        name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert all((layer.op == "conv") == isinstance(modules[name], torch.nn.Conv2d) for name, layer in layers.items())


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
    layers = discover_layers(indexed_denoiser(request.getfixturevalue(name), TABLE))
    assert [layer.name for layer in layers if layer.reads == "sample"] == [layers[0].name] == [first]
    assert [layer.name for layer in layers if layer.last] == [layers[-1].name] == [last]


def test_layers_that_read_one_tensor_share_its_number(tiny_unet: UNet2DConditionModel) -> None:
    layers = {layer.name: layer for layer in discover_layers(indexed_denoiser(tiny_unet, TABLE))}
    block = "mid_block.attentions.0.transformer_blocks.0"
    own = {layers[f"{block}.attn1.{name}"].tensor for name in ("to_q", "to_k", "to_v")}
    cross = {layers[f"{block}.attn2.{name}"].tensor for name in ("to_k", "to_v")}
    assert len(own) == len(cross) == 1
    assert own != cross
    assert layers[f"{block}.attn2.to_q"].tensor not in own | cross
    reads_text = {name for name, layer in layers.items() if layer.reads == "text"}
    assert reads_text == {name for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len({layers[name].tensor for name in reads_text}) == 1, "all of them read the same text"


def test_joint_attention_reads_image_and_text_apart(mmdit: SD3Transformer2DModel) -> None:
    layers = {layer.name: layer for layer in discover_layers(indexed_denoiser(mmdit, TABLE))}
    attention = "transformer_blocks.0.attn"
    image = {layers[f"{attention}.{name}"].tensor for name in ("to_q", "to_k", "to_v")}
    text = {layers[f"{attention}.{name}"].tensor for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
    assert len(image) == len(text) == 1
    assert image != text
    assert [name for name, layer in layers.items() if layer.reads == "text"] == ["context_embedder"], (
        "behind its first modulation the text depends on the timestep"
    )


def test_looking_for_layers_leaves_no_hook(float_denoiser: IndexedDenoiser) -> None:
    assert discover_layers(float_denoiser) == discover_layers(float_denoiser, tokens=3)
    assert not any(module._forward_pre_hooks for module in float_denoiser.modules())


def test_zero_inputs_are_what_a_denoiser_takes(float_denoiser: IndexedDenoiser) -> None:
    given = zero_inputs(float_denoiser, tokens=3, batch=2)
    assert latent_shape(float_denoiser) == (4, 8, 8)
    assert float_denoiser(*given.arguments()).shape == (2, 4, 8, 8)


def test_latents_that_are_no_square(tiny_unet: UNet2DConditionModel) -> None:
    assert latent_shape_of(network_config(tiny_unet) | {"sample_size": [6, 10]}) == (4, 6, 10)


def test_norms_that_layers_alone_read(tiny_unet: UNet2DConditionModel) -> None:
    """None of those in front of an activation, or whose output goes elsewhere too."""
    block, float_denoiser = "mid_block.attentions.0.transformer_blocks.0", indexed_denoiser(tiny_unet, TABLE)
    norms = layers_behind_norms(float_denoiser)
    assert norms[f"{block}.norm1"] == tuple(f"{block}.attn1.to_{name}" for name in "qkv")
    assert norms[f"{block}.norm2"] == (f"{block}.attn2.to_q",)
    assert norms[f"{block}.norm3"] == (f"{block}.ff.net.0.proj",)
    assert not any(".resnets." in norm for norm in norms)
    attention = float_denoiser.network.get_submodule(f"{block}.attn1")
    attention.register_forward_pre_hook(lambda _, args: args[0].abs().sum() and None)
    assert set(norms) - set(layers_behind_norms(float_denoiser)) == {f"{block}.norm1"}


def test_adaptive_norms_have_no_bias_to_shift(mmdit: SD3Transformer2DModel) -> None:
    assert layers_behind_norms(indexed_denoiser(mmdit, TABLE)) == {}
