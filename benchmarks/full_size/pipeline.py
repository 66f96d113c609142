"""Pipelines of full size with random weights, in diffusers' format: what the other full_size scripts measure with.

    python -m benchmarks.full_size.pipeline {sd14,sd21,sdxl,sdxl-half,sd3} --out DIR

The denoiser's configuration and the scheduler are the originals' own. Its weights are drawn one tensor at a time and
written shard by shard in half precision, so that the memory this takes does not depend on its size. Text encoders and
autoencoder are small ones of the same classes; what they hand on has the original's width.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from s2p_deploy.families import resolve_base
from s2p_deploy.families.checkpoint import TensorForm
from s2p_deploy.families.streamed_tensors import write_tensor_file

Config = Mapping[str, Any]

SHARD_BYTES = 10**9
TOKENS = 77
SD_V1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults
SD_V2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_HALF = SDXL | {"transformer_layers_per_block": [1, 2, 5]}  # whose floating-point engine fits into 24 GB
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Original:
    """A pipeline to imitate; ``parts`` gives the components that are neither denoiser nor scheduler.

    By the denoiser's configuration, so that their widths fit.
    """

    pipeline: type[DiffusionPipeline]
    denoiser: type[UNet2DConditionModel] | type[SD3Transformer2DModel]
    config: Config
    scheduler: SchedulerMixin
    parts: Callable[[Config], dict[str, Any]]

    @property
    def component(self) -> str:
        """The denoiser's name in the pipeline."""
        return "unet" if self.denoiser is UNet2DConditionModel else "transformer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    start = time.perf_counter()
    write_original(asked.out, MODELS[asked.original])
    found = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "gb": gigabytes(asked.out),
    }
    print(json.dumps(found))


def write_pipeline(folder: Path, unet: Config = SD_V1) -> None:
    """A pipeline of SD v1-4's kind with a UNet of that configuration (its own by default)."""
    write_original(folder, replace(ORIGINALS["sd14"], config=unet))


def write_original(folder: Path, original: Original, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a pipeline like ``original``, of any configuration of its kind, to a folder that is not there yet."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or choose another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    with torch.device("meta"):
        denoiser = original.denoiser(**original.config)
    torch.manual_seed(0)
    parts = original.parts(denoiser.config)
    pipe = original.pipeline(**parts, scheduler=original.scheduler, **{original.component: denoiser})
    try:
        pipe.save_config(partial)
        for name, part in (parts | {"scheduler": original.scheduler}).items():
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(partial / name)
        denoiser.save_config(partial / original.component)
        shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
        write_shards(partial / original.component, shapes, shard_bytes)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> None:
    """Random tensors of these shapes in float16, in one file or, beyond ``shard_bytes``, in shards with an index."""
    forms = {name: TensorForm(torch.float16, shape) for name, shape in shapes.items()}
    shards: list[dict[str, TensorForm]] = [{}]
    for name, form in forms.items():
        if shards[-1] and sum(other.bytes for other in shards[-1].values()) + form.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = form
    stem, suffix = "diffusion_pytorch_model", ".safetensors"
    files = [f"{stem}-{number:05}-of-{len(shards):05}{suffix}" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [stem + suffix]
    for file, shard in zip(files, shards, strict=True):
        write_tensor_file(folder / file, shard, lambda name: random_tensor(name, shapes[name]), {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(form.bytes for form in forms.values())}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float16, the same for the same name: norms near one, layers that keep their input's size, all else small."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith(".weight") and len(shape) > 1:
        noise *= noise[0].numel() ** -0.5
    else:
        noise *= 0.02
        noise += float(name.endswith(".weight"))
    return noise.half()


def gigabytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)


def _parts_of_sd(config: Config) -> dict[str, Any]:
    tokenizer = _tokenizer()
    encoder = CLIPTextModel(_text_config(tokenizer, config["cross_attention_dim"]))
    nothing = dict.fromkeys(("safety_checker", "feature_extractor"))
    return (
        {"vae": _autoencoder(), "tokenizer": tokenizer, "text_encoder": encoder}
        | nothing
        | {"requires_safety_checker": False}
    )


def _parts_of_sdxl(config: Config) -> dict[str, Any]:
    """The second encoder is as wide as its pooled text, which the denoiser takes beside six size ids."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    tokenizer = _tokenizer()
    return {
        "vae": _autoencoder(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": CLIPTextModel(_text_config(tokenizer, config["cross_attention_dim"] - pooled)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer, pooled)),
    }


def _parts_of_sd3(config: Config) -> dict[str, Any]:
    """Without T5: ``from_pretrained`` takes ``text_encoder_3=None, tokenizer_3=None``, as for the original.

    The pooled texts of the two other encoders stand side by side: 768 and 1280 of the original's 2048.
    """
    first = config["pooled_projection_dim"] * 3 // 8
    tokenizer = _tokenizer()
    return {
        "vae": _autoencoder_of_sd3(config["in_channels"]),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": None,
        "text_encoder": CLIPTextModelWithProjection(_text_config(tokenizer, first)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer, config["pooled_projection_dim"] - first)),
        "text_encoder_3": None,
    }


def _tokenizer() -> CLIPTokenizer:
    """The bundled pipeline's, with as many tokens as CLIP's."""
    return CLIPTokenizer.from_pretrained(resolve_base("shapes").folder / "tokenizer", model_max_length=TOKENS)


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(resolve_base("shapes").folder / "vae")


def _autoencoder_of_sd3(latent_channels: int) -> AutoencoderKL:
    """The bundled pipeline's layers with as many latent channels as asked, untrained."""
    own = AutoencoderKL.load_config(resolve_base("shapes").folder / "vae")
    return AutoencoderKL.from_config(
        own | {"latent_channels": latent_channels, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    )


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


ORIGINALS = {
    "sd14": Original(
        StableDiffusionPipeline,
        UNet2DConditionModel,
        SD_V1,
        PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        _parts_of_sd,
    ),
    "sd21": Original(
        StableDiffusionPipeline,
        UNet2DConditionModel,
        SD_V2,
        DDIMScheduler(**_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
        _parts_of_sd,
    ),
    "sdxl": Original(
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        SDXL,
        EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        _parts_of_sdxl,
    ),
    "sd3": Original(
        StableDiffusion3Pipeline, SD3Transformer2DModel, SD3, FlowMatchEulerDiscreteScheduler(shift=3.0), _parts_of_sd3
    ),
}
SHORTENED = {"sdxl-half": replace(ORIGINALS["sdxl"], config=SDXL_HALF)}
MODELS = ORIGINALS | SHORTENED


if __name__ == "__main__":
    main()
