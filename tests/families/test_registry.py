from __future__ import annotations

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from s2p_deploy.errors import InputError
from s2p_deploy.families import family_of, family_of_config, network_config
from s2p_deploy.families.mmdit import MMDiTFamily
from s2p_deploy.families.unet import UNetFamily


def test_the_class_of_the_network_decides(
    tiny_unet: UNet2DConditionModel, sdxl_unet: UNet2DConditionModel, mmdit: SD3Transformer2DModel
) -> None:
    for network, kind in ((tiny_unet, UNetFamily), (sdxl_unet, UNetFamily), (mmdit, MMDiTFamily)):
        assert isinstance(family_of(network), kind)
        assert isinstance(family_of_config(network_config(network)), kind)


def test_a_configuration_builds_the_network_again(network: torch.nn.Module) -> None:
    config = json.loads(json.dumps(network_config(network)))
    assert not [key for key in config if key.startswith("_") and key != "_class_name"]
    built = family_of_config(config).build(config)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (built, network)]
    assert shapes[0] == shapes[1]
    assert json.loads(json.dumps(network_config(built))) == config


def test_a_network_of_another_class_is_refused(tiny_unet: UNet2DConditionModel) -> None:
    with pytest.raises(InputError, match=r"class FluxTransformer2DModel is not supported: UNet2D.* and SD3"):
        family_of_config({"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(InputError, match="class None is not supported"):
        family_of_config({key: value for key, value in network_config(tiny_unet).items() if key != "_class_name"})
    with pytest.raises(InputError, match="class Linear is not supported"):
        family_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["in_channels", "out_channels"])
def test_a_configuration_that_lacks_a_value_is_refused_in_one_line(network: torch.nn.Module, name: str) -> None:
    config = network_config(network)
    del config[name]
    with pytest.raises(InputError, match=f"configuration lacks '{name}'"):
        family_of_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 8}, "reads 8 channels and writes 4 is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"num_class_embeds": 10}, "num_class_embeds=10 is not supported"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj' is not supported"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn='silu' is not supported"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image' is not supported"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text' is not supported"),
    ],
)
def test_a_unet_that_takes_more_than_text_is_refused_by_name(
    tiny_unet: UNet2DConditionModel, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        family_of_config(network_config(tiny_unet) | changes)


def test_a_transformer_reads_its_latents_or_a_mask_and_a_picture_too(mmdit: SD3Transformer2DModel) -> None:
    config = network_config(mmdit)
    with pytest.raises(
        InputError, match=r"reads 33 channels and writes 4 .*latents of 4, or for inpainting 9 with a mask"
    ):
        family_of_config(config | {"in_channels": 33})
    assert family_of_config(config | {"in_channels": 33, "out_channels": 16})
    assert family_of_config(config | {"out_channels": None}), "as many as it reads"
