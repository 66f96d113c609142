"""A pipeline whose text encoder and autoencoder are exported in a few seconds."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL

from s2p_deploy.cli import main
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.records.pipeline_parts import PipelineParts
from tests.tiny_pipeline import tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder

FACTOR = 2  # pixels of a picture per latent


def small_base(folder: Path) -> BasePipeline:
    """Writes it to ``folder``: the bundled text encoder, random weights in the UNet and the autoencoder."""
    tiny_base(folder)
    put_small_autoencoder(folder)
    return resolve_base(str(folder))


def shared_small_base(shared: SharedFolder) -> BasePipeline:
    """One for all tests, not to be changed."""
    return resolve_base(str(shared.made("small-pipeline", small_base)))


def shared_small_parts(shared: SharedFolder, backend: str) -> PipelineParts:
    """Its parts as the command makes them, which takes ten seconds; not to be changed."""
    base = str(shared_small_base(shared).folder)

    def make(out: Path) -> None:
        assert main(["parts", base, "--backend", backend, "--out", str(out)]) == 0

    return PipelineParts.open(shared.made(f"small-parts-{backend}", make))


def put_small_autoencoder(folder: Path) -> None:
    """Into a pipeline on disk, in the place of its own."""
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    autoencoder.save_pretrained(folder / "vae")
