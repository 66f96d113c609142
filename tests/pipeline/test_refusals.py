"""What would change the network is refused in one clear line, through the calls that users make on real pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from s2p_deploy.errors import InputError
from s2p_deploy.families import with_denoiser
from s2p_deploy.pipeline import EngineUNet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = "a small red circle at the top left, white background"
FACE = {"image_proj": {"weight": torch.ones(1)}, "ip_adapter": {"weight": torch.ones(1)}}


@pytest.fixture(scope="module")
def pipe(base: StableDiffusionPipeline, denoiser: EngineUNet) -> StableDiffusionPipeline:
    return with_denoiser(base, denoiser)


def compiled_parts(pipe: StableDiffusionPipeline) -> object:
    """What DeepCache and its kind replace."""
    return pipe.unet.down_blocks[0]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda pipe: pipe.enable_freeu(1.0, 1.0, 1.0, 1.0), "FreeU cannot be switched on"),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), "it has no fuse_qkv_projections"),
        (lambda pipe: pipe.fuse_lora(components=["unet"]), "no LoRA can be fused"),
        (lambda pipe: pipe.unet.load_lora_adapter({}, prefix=None), "no LoRA can be loaded"),  # by load_lora_weights
        (lambda pipe: pipe.unet.load_attn_procs({}), "no LoRA can be loaded"),
        (lambda pipe: pipe.load_ip_adapter(FACE, "", "", image_encoder_folder=None), "no IP-Adapter can be loaded"),
        (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), "it has no set_attn_processor"),
        (lambda pipe: pipe.unet.enable_xformers_memory_efficient_attention(), "leave xformers off"),
        (compiled_parts, "it has no down_blocks"),
        (lambda pipe: pipe(PROMPT, num_inference_steps=2, cross_attention_kwargs={"gligen": 1}), "cross_attention_kw"),
        (lambda pipe: pipe(PROMPT, num_inference_steps=2, ip_adapter_image_embeds=[torch.ones(2, 1, 8)]), "fixed"),
        (lambda pipe: pipe.save_pretrained("nowhere"), "use s2p_deploy.pipeline.save_engine_pipeline"),
    ],
)
def test_what_changes_the_network_is_refused(
    pipe: StableDiffusionPipeline,
    ask: Callable[[StableDiffusionPipeline], Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # diffusers saves the other components before it comes to ours
    with pytest.raises(InputError, match=words) as refused:
        ask(pipe)
    assert "\n" not in str(refused.value)


def test_xformers_may_be_switched_off(pipe: StableDiffusionPipeline) -> None:
    before = pipe.unet
    pipe.disable_xformers_memory_efficient_attention()  # asks nothing of an engine, so it is no refusal
    assert pipe.unet is before


def test_residuals_of_a_controlnet_are_refused(pipe: StableDiffusionPipeline) -> None:
    controlnet = ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
    )
    guided = StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    with pytest.raises(InputError, match="cannot take down_block_additional_residuals"):
        guided(PROMPT, image=torch.zeros(1, 3, 64, 64), num_inference_steps=2)


def test_what_is_not_there_is_said_to_be_missing(denoiser: EngineUNet) -> None:
    """Pipelines look with ``hasattr`` whether their network has something."""
    assert not hasattr(denoiser, "encoder_hid_proj")
    assert getattr(denoiser, "peft_config", None) is None
    assert denoiser.config.in_channels == 4
