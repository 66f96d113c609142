"""What would change the network is refused in one clear line, through the calls that users make on real pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    PAGHunyuanAttnProcessor2_0,
)

from s2p_deploy.errors import InputError
from s2p_deploy.families import with_denoiser
from s2p_deploy.pipeline import EngineUNet, initial_noise

if TYPE_CHECKING:
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
        (lambda pipe: pipe.fuse_lora(components=["unet"]), "no LoRA can be fused"),
        (lambda pipe: pipe.unet.load_lora_adapter({}, prefix=None), "no LoRA can be loaded"),  # by load_lora_weights
        (lambda pipe: pipe.unet.load_attn_procs({}), "no LoRA can be loaded"),
        (lambda pipe: pipe.load_ip_adapter(FACE, "", "", image_encoder_folder=None), "no IP-Adapter can be loaded"),
        (lambda pipe: pipe.unet.set_attn_processor(PAGHunyuanAttnProcessor2_0()), "cannot take PAGHunyuanAttnProc"),
        (lambda pipe: pipe.unet.set_attn_processor({"mid": AttnAddedKVProcessor()}), "cannot take AttnAddedKV"),
        (lambda pipe: pipe.unet.enable_xformers_memory_efficient_attention(), "leave xformers off"),
        (compiled_parts, "it has no down_blocks"),
        (lambda pipe: pipe(PROMPT, num_inference_steps=2, cross_attention_kwargs={"gligen": 1}), "cross_attention_kw"),
        (lambda pipe: pipe(PROMPT, num_inference_steps=2, ip_adapter_image_embeds=[torch.ones(2, 1, 8)]), "load it f"),
        (lambda pipe: pipe.unet.save_pretrained("nowhere"), "not that of an engine on disk"),
        (lambda pipe: pipe.unet.save_pretrained("nowhere", push_to_hub=True), "upload the folder with huggingface_hub"),
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


NOTHING: dict[str, Callable[[StableDiffusionPipeline], object]] = {
    "disable_freeu": lambda pipe: pipe.disable_freeu(),
    "unload_ip_adapter": lambda pipe: pipe.unload_ip_adapter(),
    "unload_lora": lambda pipe: pipe.unet.unload_lora(),  # by unload_lora_weights, which needs peft
    "unfuse_lora": lambda pipe: pipe.unet.unfuse_lora(),
    "default_attention": lambda pipe: pipe.unet.set_default_attn_processor(),
    "attention": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "attentions": lambda pipe: pipe.unet.set_attn_processor({"mid_block": AttnProcessor2_0()}),
    "same_attentions": lambda pipe: pipe.unet.set_attn_processor(pipe.unet.attn_processors),
    "attention_slicing": lambda pipe: (pipe.enable_attention_slicing(1), pipe.unet.set_attention_slice("max")),
    "no_attention_slicing": lambda pipe: pipe.disable_attention_slicing(),
    "fuse_qkv_projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "unfuse_qkv_projections": lambda pipe: pipe.unet.unfuse_qkv_projections(),
    "no_xformers": lambda pipe: pipe.disable_xformers_memory_efficient_attention(),
    "evaluation": lambda pipe: pipe.unet.eval().requires_grad_(False),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_passes(base: StableDiffusionPipeline, denoiser: EngineUNet, name: str) -> None:
    # of its own, because diffusers leaves attributes on it
    own, asked = copy.deepcopy(denoiser), {"num_inference_steps": 2, "output_type": "latent"}
    pipe = with_denoiser(base, own)
    latents = initial_noise([3], denoiser.config)
    expected = pipe(PROMPT, latents=latents, **asked).images
    NOTHING[name](pipe)
    assert pipe.unet is own
    assert torch.equal(pipe(PROMPT, latents=latents, **asked).images, expected)


def test_masks_of_ones_and_a_lora_scale_of_one_pass(denoiser: EngineUNet) -> None:
    sample, text = initial_noise([1, 2], denoiser.config), torch.ones(2, 24, 128)
    expected = denoiser(sample, 1, text).sample
    ones = {"encoder_attention_mask": torch.ones(2, 24), "attention_mask": torch.ones(2, 1, 64, dtype=torch.bool)}
    found = denoiser(sample, 1, text, cross_attention_kwargs={"scale": 1.0}, **ones).sample
    assert torch.equal(found, expected)
    for name, mask in ones.items():
        with pytest.raises(InputError, match=f"cannot take {name}"):
            denoiser(sample, 1, text, **{name: torch.cat([mask[..., :-1], 0 * mask[..., -1:]], -1)})


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
