"""LoRA files held against a pipeline with an engine, and acting in it for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.engines.lora_bank import LoraBank
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, with_components
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.pipeline import engine_denoiser
from s2p_deploy.pipeline.engine_component import EngineComponent
from s2p_deploy.pipeline.lora_files import LoraReader, loras_acting, text_encoders
from s2p_deploy.records.optional_inputs import LORA_DOWN, LORA_UP, LoraSlot, LoraSlots
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import TABLE

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.pipeline import EngineUNet

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK = 4


@pytest.fixture
def pipe(base: StableDiffusionPipeline, denoiser: EngineUNet) -> StableDiffusionPipeline:
    """With one branch, which nothing computes."""
    width = base.unet.get_submodule(TO_Q).in_features
    slots = LoraSlots(RANK, (LoraSlot(TO_Q, "linear", (width,), width, 0, 1, 0),))
    sizes = dict.fromkeys((LORA_DOWN, LORA_UP), width * RANK)
    bank = LoraBank(slots, "float32", sizes, lambda _name, _value: None)
    return with_components(base, {"unet": engine_denoiser(denoiser.runner, base.unet.config, TABLE, bank=bank)})


@pytest.fixture
def file(origin: BasePipeline, tmp_path: Path) -> Path:
    layers = random_layers(origin, {"unet": [TO_Q], "text_encoder": [TEXT]}, rank=RANK)
    return write_lora(tmp_path / "ink.safetensors", in_peft(layers))


def test_loras_act_until_the_context_is_left(pipe: StableDiffusionPipeline, origin: BasePipeline, file: Path) -> None:
    weight = pipe.text_encoder.get_parameter(f"{TEXT}.weight")
    before, loras = weight.detach().clone(), denoiser_of(pipe).loras
    with loras_acting(pipe, origin, [GivenLora(file, 0.5)]):
        changed = LoraReader(pipe, origin).read(file).in_memory(["text_encoder"])
        difference = changed.read(changed.layers[0]).difference()
        assert torch.equal(weight, before + 0.5 * difference)
        np.testing.assert_array_equal(loras.strengths({}, torch.zeros(2, 4, 8, 8)), np.full((2, RANK), 0.5))
    assert torch.equal(weight, before)
    assert loras.strengths({}, torch.zeros(2, 4, 8, 8)) is None
    assert loras.bank.names == ()


def test_those_that_acted_before_act_again(pipe: StableDiffusionPipeline, origin: BasePipeline, file: Path) -> None:
    loras = denoiser_of(pipe).loras
    loras.add(LoraReader(pipe, origin).read(file), "mine")
    loras.set({"mine": 0.25})
    with loras_acting(pipe, origin, [GivenLora(file, 0.5)]):
        assert loras.active == {str(file): 0.5}
    assert loras.active == {"mine": 0.25}


def test_a_part_in_memory_needs_the_file_no_more(
    pipe: StableDiffusionPipeline, origin: BasePipeline, file: Path
) -> None:
    part = LoraReader(pipe, origin).read(file).in_memory(["text_encoder"])
    file.unlink()
    assert [(layer.component, layer.path) for layer in part.layers] == [("text_encoder", TEXT)]
    assert part.read(part.layers[0]).down.shape == (RANK, 128)


def test_a_text_encoder_on_an_engine_is_named(pipe: StableDiffusionPipeline, origin: BasePipeline, file: Path) -> None:
    on_engine = with_components(pipe, {"text_encoder": EngineComponent(pipe.text_encoder.config.to_dict())})
    assert text_encoders(on_engine) == {}
    with pytest.raises(InputError, match="changes the text_encoder, which runs on an engine here: leave --components"):
        LoraReader(on_engine, origin).read(file)


def test_a_lora_is_given_once(pipe: StableDiffusionPipeline, origin: BasePipeline, file: Path) -> None:
    with (
        pytest.raises(InputError, match="is given twice"),
        loras_acting(pipe, origin, [GivenLora(file), GivenLora(file, 0.5)]),
    ):
        pass


def test_an_engine_without_branches_takes_none(
    base: StableDiffusionPipeline, denoiser: EngineUNet, origin: BasePipeline, file: Path
) -> None:
    pipe = with_components(base, {"unet": denoiser})
    with loras_acting(pipe, origin, []):
        pass
    with pytest.raises(InputError, match="no low-rank branches"), loras_acting(pipe, origin, [GivenLora(file)]):
        pass
