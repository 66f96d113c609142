"""Text encoders and autoencoders of the originals' sizes, random weights, as engines: seconds, memory and bytes.

    python -m benchmarks.full_size.components {sd14,sdxl} --backend tensorrt_rtx [--work build/full_size]

The denoiser beside them is a small one: none of its weights is read. Figures go into
``results/full_size_components.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size.pipeline import ORIGINALS, SD_V1, SDXL, TOKENS, write_original
from s2p_deploy.engines.component_engines import build_component_engines
from s2p_deploy.families import resolve_base

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL = {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 8}
CONFIGS = {"sd14": SD_V1 | SMALL, "sdxl": SDXL | {"block_out_channels": [64, 64, 128], "norm_num_groups": 8}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", choices=CONFIGS)
    parser.add_argument("--backend", default="tensorrt_rtx")
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_components.json")
    asked = parser.parse_args()
    folder = asked.work / f"{asked.original}-components"
    if not folder.exists():
        write_pipeline(asked.original, folder)
    found = measure(folder, asked.backend, asked.work / f"{asked.original}-{asked.backend}")
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    known[asked.original] = known.get(asked.original, {}) | {asked.backend: found}
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def write_pipeline(name: str, folder: Path) -> None:
    """Writes a pipeline of the original's text encoders and autoencoder, and of a small denoiser."""
    original = ORIGINALS[name]

    def parts(config: Any) -> dict[str, Any]:  # noqa: ANN401 - as diffusers has it
        made = original.parts(config)
        vocabulary = {"vocab_size": 49408, "max_position_embeddings": TOKENS}
        made["text_encoder"] = CLIPTextModel(CLIPTextConfig(**CLIP_L, **vocabulary))
        made["vae"] = AutoencoderKL(**VAE, sample_size=8 * int(config["sample_size"]))
        if "text_encoder_2" in made:
            wide = CLIPTextConfig(**OPENCLIP_G, **vocabulary, projection_dim=1280)
            made["text_encoder_2"] = CLIPTextModelWithProjection(wide)
        return made

    torch.manual_seed(0)
    write_original(folder, replace(original, config=CONFIGS[name], parts=parts))


def measure(folder: Path, backend: str, out: Path) -> dict[str, Any]:
    """Builds the engines of a pipeline; the peak memory is this process's or a child's, whichever is larger."""
    start = time.perf_counter()
    made = build_component_engines(resolve_base(str(folder)), out, backend=backend, replace=True)
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak * 1024 / 1e9, 2),
        "gb": {name: round(made.sizes[network.files[0]] / 1e9, 3) for name, network in made.networks.items()},
        "environment": made.environment,
    }


if __name__ == "__main__":
    main()
