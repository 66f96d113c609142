"""The siblings of the bundled pipeline: denoisers of the SD2, SDXL and SD3 kind over its autoencoder and captions.

A sibling is assembled with an untrained denoiser first; what the denoiser is then trained on comes out of the
pipeline's own ``encode_prompt``, so it is what the finished pipeline will feed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sibling_sd2
import sibling_sd3
import sibling_sdxl
import torch
from autoencoder import scaled_latents
from text_encoders import tokenize
from training import Schedule, last_weights, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from torch import Tensor, nn

    Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Sibling:
    """How one kind is put together and trained; ``loss(pipe, latents, captions)`` gives the training loss."""

    schedule: Schedule
    guidance_scale: float
    assemble: Callable[[Path, StableDiffusionPipeline], DiffusionPipeline]
    loss: Callable[[DiffusionPipeline, Tensor, list[str]], Loss]


SIBLINGS = {
    "sd2": Sibling(sibling_sd2.SCHEDULE, sibling_sd2.GUIDANCE_SCALE, sibling_sd2.assemble, sibling_sd2.loss),
    "sdxl": Sibling(sibling_sdxl.SCHEDULE, sibling_sdxl.GUIDANCE_SCALE, sibling_sdxl.assemble, sibling_sdxl.loss),
    "sd3": Sibling(sibling_sd3.SCHEDULE, sibling_sd3.GUIDANCE_SCALE, sibling_sd3.assemble, sibling_sd3.loss),
}


def train_sibling(kind: str, folder: Path, base: StableDiffusionPipeline, *, snapshot: bool) -> DiffusionPipeline:
    """Trains (or goes on with) a sibling over the parts of ``base``.

    With ``snapshot`` nothing is trained: the denoiser gets the weights of its last checkpoint in ``folder``, which a
    training may be writing at the same time.
    """
    sibling = SIBLINGS[kind]
    torch.manual_seed(0)
    pipe = sibling.assemble(folder, base)
    denoiser: nn.Module = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    checkpoint = folder / f"{kind}.safetensors"
    if snapshot:
        denoiser.load_state_dict(last_weights(checkpoint))
        return pipe
    denoiser.train()
    loss = sibling.loss(pipe, *scaled_latents(pipe.vae, folder))
    denoiser.load_state_dict(train(denoiser, loss, sibling.schedule, checkpoint))
    denoiser.eval()
    tokenize(base.tokenizer, [""])  # its file records how it was last called: as the bundled one's
    return pipe
