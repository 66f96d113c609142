"""Networks of every family that run in milliseconds, with random weights from a fixed seed."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

TOKENS, TEXT, POOLED = 5, 12, 10


def tiny_unet(cross_attention_dim: int, **changes: int) -> UNet2DConditionModel:
    """A UNet of the SD1 kind: 8x8x4 latents, 8 and 16 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    )


def tiny_sdxl_unet(added: int = POOLED + 6 * 4, **changes: int) -> UNet2DConditionModel:
    """A UNet of the SDXL kind: 8x8x4 latents, text of 12; unless ``added`` differs, pooled text of 10 and six ids."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=added,
        **changes,
    ).eval()


def tiny_refiner_unet() -> UNet2DConditionModel:
    """A UNet of SDXL's refiner: five ids, and pooled text as wide as the text."""
    return tiny_sdxl_unet(TEXT + 5 * 4)


def tiny_mmdit(dual: tuple[int, ...] = (), channels: int = 4) -> SD3Transformer2DModel:
    """A transformer of the SD3 kind: 8x8x4 latents, text of 12, pooled text of 10; ``dual`` layers as in SD3.5."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    ).eval()
