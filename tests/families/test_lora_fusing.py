"""LoRAs in weights in memory: what diffusers fuses, for as long as the context lasts, and not a bit longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.families import load_pipeline
from s2p_deploy.families.lora import Lora
from s2p_deploy.families.lora_fusing import fused, loadable_networks, weights_in_memory
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import shared_small_base

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder

LAYERS = {
    "unet": ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj"],
}


def test_weights_are_fused_inside_and_their_own_outside(shared: SharedFolder, tmp_path: Path) -> None:
    base = shared_small_base(shared)
    pipe = load_pipeline(base)
    networks = loadable_networks(pipe)
    assert set(networks) == {"unet", "text_encoder"}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in networks.items()}
    layers = random_layers(base, LAYERS)
    lora = Lora(write_lora(tmp_path / "a.safetensors", in_peft(layers)), weights_in_memory(networks))

    def inside() -> None:
        for layer in layers:
            weight = networks[layer.component].get_submodule(layer.path).weight
            product = (layer.up.flatten(1) @ layer.down.flatten(1)).view_as(weight) * layer.alpha / layer.rank
            expected = before[layer.component][f"{layer.path}.weight"] + 1.5 * product
            torch.testing.assert_close(weight.detach(), expected)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), fused(networks, [(lora, 0.5), (lora, 1.0)]):
        inside()
    after = {name: part.state_dict() for name, part in networks.items()}
    assert all(torch.equal(before[name][key], value) for name, part in after.items() for key, value in part.items())


def test_components_that_are_not_given_are_passed_over(shared: SharedFolder, tmp_path: Path) -> None:
    base = shared_small_base(shared)
    pipe = load_pipeline(base)
    networks = loadable_networks(pipe)
    file = write_lora(tmp_path / "a.safetensors", in_peft(random_layers(base, LAYERS)))
    lora = Lora(file, weights_in_memory(networks))
    own = pipe.unet.conv_in.weight.detach().clone()
    with fused({"text_encoder": pipe.text_encoder}, [(lora, 1.0)]):
        assert torch.equal(pipe.unet.conv_in.weight, own)
