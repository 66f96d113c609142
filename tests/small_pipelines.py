"""Small pipelines for tests: of every family, trained or random, on disk and behind a runner's interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

from s2p_deploy.cli import main
from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import BasePipeline, denoiser_of, family_of, resolve_base
from s2p_deploy.pipeline import EngineDenoiser, engine_denoiser
from s2p_deploy.records import ComponentEngines, TimestepTable
from s2p_deploy.timesteps import timestep_table_of
from tests.tiny_networks import tiny_unet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from tests.shared_folder import SharedFolder

PIPELINES = Path(__file__).parent / "assets" / "pipelines"
TABLE = TimestepTable("PNDMScheduler", {}, 50, (1, 501, 940), np.linspace(0.1, 1.5, 1000))
FACTOR = 2  # pixels of a picture per latent, of the small autoencoder
WIDTH = 256  # of SD3's joint text states


def sibling(name: str) -> BasePipeline:
    """A trained pipeline of another kind, such as ``sd2``: 8x8x4 latents, the bundled one's autoencoder, tokenizer."""
    return resolve_base(str(PIPELINES / f"shapes-{name}"))


def tiny_base(folder: Path) -> BasePipeline:
    """Writes a pipeline whose UNet (random weights) runs in a millisecond: bundled text encoder and autoencoder."""
    shutil.copytree(resolve_base("shapes").folder, folder, ignore=shutil.ignore_patterns("unet", "classifier*"))
    tiny_unet(cross_attention_dim=128).save_pretrained(folder / "unet")
    return resolve_base(str(folder))


def small_base(folder: Path) -> BasePipeline:
    """Writes a pipeline whose text encoder and autoencoder are exported in seconds: the latter random, as the UNet."""
    tiny_base(folder)
    put_small_autoencoder(folder)
    return resolve_base(str(folder))


def shared_small_base(shared: SharedFolder) -> BasePipeline:
    """The same of all tests, not to be changed."""
    return resolve_base(str(shared.made("small-pipeline", small_base)))


def shared_small_components(shared: SharedFolder, backend: str) -> ComponentEngines:
    """Its component engines as the command makes them, which takes ten seconds; not to be changed."""
    base = str(shared_small_base(shared).folder)

    def make(out: Path) -> None:
        assert main(["components", base, "--backend", backend, "--out", str(out)]) == 0

    return ComponentEngines.open(shared.made(f"small-components-{backend}", make))


def put_small_autoencoder(folder: Path) -> None:
    """Replaces the autoencoder of a pipeline on disk."""
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


def t5_base(folder: Path) -> BasePipeline:
    """Writes the small SD3 with a third text encoder: T5's kind with random weights, fed by a CLIP tokenizer."""
    shutil.copytree(PIPELINES / "shapes-sd3", folder)
    put_small_autoencoder(folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"tokenizer_3": index["tokenizer"], "text_encoder_3": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=274, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return resolve_base(str(folder))


def whole_denoiser(pipe: DiffusionPipeline, steps: int) -> EngineDenoiser:
    """The pipeline's own denoiser behind a runner's interface: what is drawn with it must not change by a bit."""
    network = denoiser_of(pipe)
    table = timestep_table_of(pipe.scheduler, steps, fractional=True)
    family, timesteps = family_of(network), torch.from_numpy(table.timesteps).float()

    def predict(
        sample: torch.Tensor, indices: torch.Tensor, text: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        nothing = sample.new_zeros(len(sample), 0)
        return family.predict(network, sample, timesteps[indices], text, nothing if added is None else added)

    return engine_denoiser(TorchRunner(predict), network.config, table)
